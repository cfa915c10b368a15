package main

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"

	"github.com/weft-mesh/weft/control/compile"
)

// A checked is what check prints.
type checked struct {
	Objects  int            `json:"objects"` // that Weft reads
	Findings []checkFinding `json:"findings"`
}

// A checkFinding is a finding, and where the object is.
type checkFinding struct {
	File      string `json:"file"`
	Document  int    `json:"document"` // from 1
	Kind      string `json:"kind,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	Severity  string `json:"severity"` // error or warning
	Path      string `json:"path,omitempty"`
	Message   string `json:"message"`
}

// A document is one object of a file.
type document struct {
	file   string
	number int
	object *unstructured.Unstructured
}

func checkCommand() *cobra.Command {
	var out output
	var namespace string
	c := &cobra.Command{
		Use:   "check FILE...",
		Short: "Find what is wrong with routing and policy objects before they are applied",
		Long: `Check reads Kubernetes objects from files, directories or standard input (-), and
tells what the control service would tell once they are applied: errors with
their fields, and warnings. It asks no cluster.

With Services among the files it also looks for what the other objects name.
The exit code is 1 if there are errors.`,
		Example: "  weft check routes.yaml policies/\n  kubectl get virtualservices -A -o yaml | weft check -",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := out.check(); err != nil {
				return err
			}
			result, err := checkFiles(args, cmd.InOrStdin(), namespace)
			if err != nil {
				return err
			}
			if err := out.print(cmd.OutOrStdout(), result, result.people); err != nil {
				return err
			}
			if n := result.errors(); n > 0 {
				return fmt.Errorf("%s: correct the fields named above", count(n, "error"))
			}
			return nil
		},
	}
	out.flag(c)
	c.Flags().StringVar(&namespace, "default-namespace", "default", "namespace of objects that name none")
	return c
}

// checkFiles checks every object of the files. Its error is about the files
// themselves.
func checkFiles(names []string, stdin io.Reader, namespace string) (checked, error) {
	out := checked{Findings: []checkFinding{}}
	var docs []document
	for _, name := range names {
		files, err := filesOf(name)
		if err != nil {
			return out, err
		}
		for _, file := range files {
			more, err := readDocuments(file, stdin, &out)
			if err != nil {
				return out, err
			}
			docs = append(docs, more...)
		}
	}
	var in compile.Inputs
	for i, d := range docs {
		d.object = withNamespace(d.object, namespace)
		docs[i] = d
		known, err := in.Add(d.object)
		if err != nil {
			out.add(d, compile.Finding{Message: err.Error()})
		}
		found, reviewed := compile.Review(d.object)
		for _, f := range found {
			out.add(d, f)
		}
		if known || reviewed {
			out.Objects++
		}
	}
	if len(in.Services) > 0 {
		out.resolve(docs, in)
	}
	slices.SortStableFunc(out.Findings, func(a, b checkFinding) int {
		return cmp.Or(strings.Compare(a.File, b.File), cmp.Compare(a.Document, b.Document))
	})
	return out, nil
}

// withNamespace returns u in the namespace if it has none.
func withNamespace(u *unstructured.Unstructured, namespace string) *unstructured.Unstructured {
	if u.GetNamespace() != "" || slices.Contains([]string{"Namespace", "GatewayClass", "Node"}, u.GetKind()) {
		return u
	}
	u = u.DeepCopy()
	u.SetNamespace(namespace)
	return u
}

// resolve adds what comes out only when all objects are compiled together.
func (c *checked) resolve(docs []document, in compile.Inputs) {
	at := map[string]document{}
	for _, d := range docs {
		at[d.object.GetKind()+"/"+d.object.GetNamespace()+"/"+d.object.GetName()] = d
	}
	for _, s := range compile.Compile(compile.Settings{}, in).Statuses {
		d, ok := at[s.Kind+"/"+s.Name.String()]
		if !ok {
			continue
		}
		conditions := s.Conditions
		for _, p := range s.Parents {
			conditions = append(slices.Clone(conditions), p.Conditions...)
		}
		for _, x := range conditions {
			if x.OK || !slices.Contains([]string{compile.ResolvedRefs, compile.Programmed, compile.WaypointAccepted, compile.WaypointBound}, x.Type) {
				continue
			}
			if x.Reason != "Invalid" && x.Reason != "UnsupportedValue" && s.Kind != compile.KindGateway { // those are findings already
				c.add(d, compile.Finding{Severity: compile.SeverityWarning, Message: x.Type + " would be false: " + x.Message})
			}
		}
	}
}

func (c *checked) add(d document, f compile.Finding) {
	severity := "error"
	if f.Severity != compile.SeverityError {
		severity = string(f.Severity)
	}
	x := checkFinding{File: d.file, Document: d.number, Severity: severity, Path: f.Path, Message: f.Message}
	if d.object != nil {
		x.Kind, x.Namespace, x.Name = d.object.GetKind(), d.object.GetNamespace(), d.object.GetName()
	}
	c.Findings = append(c.Findings, x)
}

func (c checked) errors() int {
	n := 0
	for _, f := range c.Findings {
		if f.Severity == "error" {
			n++
		}
	}
	return n
}

func (c checked) people(w io.Writer) error {
	if len(c.Findings) == 0 {
		_, err := fmt.Fprintf(w, "%s: nothing is wrong\n", count(c.Objects, "object"))
		return err
	}
	rows := [][]string{{"WHERE", "OBJECT", "LEVEL", "FIELD", "MESSAGE"}}
	for _, f := range c.Findings {
		object := f.Kind + " " + strings.TrimPrefix(f.Namespace+"/"+f.Name, "/")
		rows = append(rows, []string{fmt.Sprintf("%s:%d", f.File, f.Document), strings.TrimSpace(object), f.Severity, f.Path, f.Message})
	}
	return table(w, rows)
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// filesOf returns the name itself, or the YAML and JSON files below a
// directory.
func filesOf(name string) ([]string, error) {
	if name == "-" {
		return []string{name}, nil
	}
	info, err := os.Stat(name)
	if err != nil {
		return nil, fmt.Errorf("read objects: %w", err)
	}
	if !info.IsDir() {
		return []string{name}, nil
	}
	var out []string
	err = filepath.WalkDir(name, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(path)) {
			out = append(out, path)
		}
		return err
	})
	if err == nil && len(out) == 0 {
		err = fmt.Errorf("no file of %s ends in .yaml, .yml or .json", name)
	}
	if err != nil {
		return nil, fmt.Errorf("read objects: %w", err)
	}
	return out, nil
}

// readDocuments reads the objects of one file. A document that is not YAML is
// a finding, and the others are read all the same.
func readDocuments(file string, stdin io.Reader, out *checked) ([]document, error) {
	from := stdin
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("read objects: %w", err)
		}
		defer f.Close()
		from = f
	}
	var docs []document
	r := utilyaml.NewYAMLReader(bufio.NewReader(from))
	for n := 1; ; n++ {
		b, err := r.Read()
		if errors.Is(err, io.EOF) {
			return docs, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read objects of %s: %w", file, err)
		}
		os, err := objectsOf(b)
		if err != nil {
			out.add(document{file: file, number: n}, compile.Finding{Message: err.Error()})
		}
		for _, u := range os {
			docs = append(docs, document{file, n, u})
		}
	}
}

// objectsOf reads one document: nothing, an object, or a list of them.
func objectsOf(b []byte) ([]*unstructured.Unstructured, error) {
	j, err := yaml.YAMLToJSONStrict(b)
	if err != nil {
		return nil, fmt.Errorf("is not YAML: %w", err)
	}
	if string(bytes.TrimSpace(j)) == "null" {
		return nil, nil
	}
	u := &unstructured.Unstructured{}
	if err := u.UnmarshalJSON(j); err != nil {
		return nil, fmt.Errorf("is no Kubernetes object: %w", err)
	}
	if !u.IsList() {
		return []*unstructured.Unstructured{u}, nil
	}
	var out []*unstructured.Unstructured
	err = u.EachListItem(func(o runtime.Object) error {
		out = append(out, o.(*unstructured.Unstructured))
		return nil
	})
	return out, err
}
