package bench

import (
	"fmt"
	"html"
	"io"
	"strings"
)

// A Chart is a group of horizontal bars that are compared.
type Chart struct {
	Title, Unit string
	Bars        []Bar
}

// A Bar is one of a chart's figures. The one that stands out is ours.
type Bar struct {
	Name  string
	Value float64
	Ours  bool
}

// Plot writes the charts below each other as one SVG.
func Plot(w io.Writer, charts []Chart) error {
	const width, left, bar, gap, head = 760, 180, 18, 6, 34
	height := 10
	for _, c := range charts {
		height += head + len(c.Bars)*(bar+gap) + 14
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", width, height, width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", width, height)
	y := 10
	for _, c := range charts {
		var most float64
		for _, v := range c.Bars {
			most = max(most, v.Value)
		}
		fmt.Fprintf(&b, `<text x="10" y="%d" font-size="14" font-weight="bold">%s</text><text x="%d" y="%d" text-anchor="end" fill="#666666">%s, less is better</text>`+"\n",
			y+16, html.EscapeString(c.Title), width-10, y+16, html.EscapeString(c.Unit))
		y += head
		for _, v := range c.Bars {
			fill, n := "#9aa5b1", 0.0
			if v.Ours {
				fill = "#0b7285"
			}
			if most > 0 {
				n = v.Value / most * (width - left - 80)
			}
			fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text><rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/><text x="%.1f" y="%d">%s</text>`+"\n",
				left-8, y+13, html.EscapeString(v.Name), left, y, n, bar, fill, left+n+6, y+13, Number(v.Value))
			y += bar + gap
		}
		y += 14
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}
