package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"
)

// An output is how a command prints: for people, or as data.
type output string

func (o *output) flag(c *cobra.Command) {
	c.Flags().StringVarP((*string)(o), "output", "o", "", "print as json or yaml instead of for people")
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
}

// check says whether the format is known, before anything is asked.
func (o output) check() error {
	switch o {
	case "", "json", "yaml":
		return nil
	}
	return fmt.Errorf("print as %q: want json or yaml", string(o))
}

// print writes v as data, or calls people.
func (o output) print(w io.Writer, v any, people func(io.Writer) error) error {
	switch o {
	case "json":
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(v)
	case "yaml":
		b, err := yaml.Marshal(v)
		if err != nil {
			return err
		}
		_, err = w.Write(b)
		return err
	}
	return people(w)
}

// table writes rows with aligned columns. Empty cells become a dash.
func table(w io.Writer, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		for i := range r {
			if r[i] == "" {
				r[i] = "-"
			}
		}
		fmt.Fprintln(t, strings.Join(r, "\t"))
	}
	return t.Flush()
}
