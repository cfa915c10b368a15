package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
)

// Median returns the middle one, and 0 of none.
func Median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// Ratio returns the median of a[i]/b[i], of rounds that were measured next to
// each other.
func Ratio(a, b []float64) float64 {
	var r []float64
	for i := range min(len(a), len(b)) {
		if b[i] != 0 {
			r = append(r, a[i]/b[i])
		}
	}
	return Median(r)
}

// Merge adds figures to the JSON object in the file at path, which it makes if
// it is missing. Figures with the same name are replaced.
func Merge(path string, figures map[string]float64) error {
	all := map[string]float64{}
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	default:
		if err := json.Unmarshal(b, &all); err != nil {
			return fmt.Errorf("figures in %s: %w", path, err)
		}
	}
	for k, v := range figures {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return fmt.Errorf("figure %s is %v", k, v)
		}
		all[k] = round(v)
	}
	if b, err = json.MarshalIndent(all, "", "  "); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

// round keeps four digits: more is noise.
func round(v float64) float64 {
	if v == 0 {
		return 0
	}
	scale := math.Pow(10, 3-math.Floor(math.Log10(math.Abs(v))))
	return math.Round(v*scale) / scale
}

// Number prints v with as many digits as mean something.
func Number(v float64) string {
	switch r := round(v); {
	case r == 0:
		return "0"
	case math.Abs(r) >= 100:
		return fmt.Sprintf("%.0f", r)
	case math.Abs(r) >= 10:
		return fmt.Sprintf("%.1f", r)
	default:
		return fmt.Sprintf("%.2f", r)
	}
}

// Table prints rows with aligned columns, the first to the left.
func Table(w io.Writer, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	width := 0
	for _, r := range rows {
		width = max(width, len(r[0]))
	}
	for _, r := range rows {
		fmt.Fprintf(t, "%-*s\t%s\t\n", width, r[0], strings.Join(r[1:], "\t"))
	}
	return t.Flush()
}

func splitLines(s string) iter.Seq[string] { return strings.SplitSeq(s, "\n") }
