package route

import (
	"fmt"

	"github.com/weft-mesh/weft/mesh"
)

// CORS is a mesh.CORS that is ready.
type CORS struct {
	Spec    *mesh.CORS
	origins []text
}

func compileCORS(spec *mesh.CORS) (*CORS, error) {
	if spec == nil {
		return nil, nil
	}
	c := &CORS{Spec: spec}
	for _, m := range spec.AllowOrigins {
		t, err := compileText(m)
		if err != nil {
			return nil, fmt.Errorf("cors: origin: %w", err)
		}
		c.origins = append(c.origins, t)
	}
	return c, nil
}

// Allows reports whether scripts of origin may read responses.
func (c *CORS) Allows(origin []byte) bool {
	for i := range c.origins {
		t := &c.origins[i]
		if t.kind == mesh.TextExact && t.value == "*" || t.holds(origin) {
			return true
		}
	}
	return false
}
