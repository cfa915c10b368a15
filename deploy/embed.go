// Package deploy holds the Helm chart that installs Weft, as files, so that
// the weft command installs just what a Helm user gets.
package deploy

import (
	"embed"
	"io/fs"
)

//go:embed all:chart
var files embed.FS

// Chart returns the chart's files, Chart.yaml at the top.
func Chart() fs.FS {
	chart, err := fs.Sub(files, "chart")
	if err != nil {
		panic(err) // only for an invalid path, which "chart" is not
	}
	return chart
}
