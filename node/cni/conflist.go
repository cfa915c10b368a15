package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
)

// derivedSuffix ends the name of a conflist that we made from a lone .conf
// file. "-" sorts before ".", so 10-net-weft.conflist comes directly before
// the 10-net.conf it was made from, and the runtime takes it instead.
const derivedSuffix = "-weft.conflist"

// A span is a half-open range of bytes in a file.
type span struct{ start, end int }

// A layout says where the plugins of a conflist stand in its text. Edits are
// made to the text, so that everything that is not ours stays byte by byte.
type layout struct {
	open    int // just after the "[" of plugins
	plugins []span
	ours    []int // indices of our entries
	version string
}

// parseConflist checks data as strictly as a runtime does and finds its plugins.
func parseConflist(data []byte) (layout, error) {
	l, err := scanPlugins(data)
	if err != nil {
		return layout{}, err
	}
	var head struct {
		Name       string `json:"name"`
		CNIVersion string `json:"cniVersion"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return layout{}, err
	}
	l.version = head.CNIVersion
	if head.Name == "" {
		return layout{}, errors.New("it has no name")
	}
	if len(l.plugins) == 0 {
		return layout{}, errors.New("it has no plugins")
	}
	for i, p := range l.plugins {
		var plugin struct {
			Type string `json:"type"`
		}
		if err := json.Unmarshal(data[p.start:p.end], &plugin); err != nil {
			return layout{}, fmt.Errorf("plugin %d: %v", i, err)
		}
		if plugin.Type == "" {
			return layout{}, fmt.Errorf("plugin %d has no type", i)
		}
		if plugin.Type == PluginType {
			l.ours = append(l.ours, i)
		}
	}
	return l, nil
}

// scanPlugins finds the elements of the top-level array "plugins". Of several
// such keys the last counts, as in encoding/json and so in the runtimes.
func scanPlugins(data []byte) (layout, error) {
	if !json.Valid(data) {
		return layout{}, errors.New("it is not JSON")
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	if tok, err := dec.Token(); err != nil || tok != json.Delim('{') {
		return layout{}, errors.New("it is not a JSON object")
	}
	var l layout
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return layout{}, err
		}
		if key != "plugins" {
			var skip json.RawMessage
			if err := dec.Decode(&skip); err != nil {
				return layout{}, err
			}
			continue
		}
		if tok, err := dec.Token(); err != nil || tok != json.Delim('[') {
			return layout{}, errors.New("its plugins are not a list")
		}
		l = layout{open: int(dec.InputOffset())}
		for dec.More() {
			var p json.RawMessage
			if err := dec.Decode(&p); err != nil {
				return layout{}, err
			}
			end := int(dec.InputOffset())
			l.plugins = append(l.plugins, span{end - len(p), end})
		}
		if _, err := dec.Token(); err != nil {
			return layout{}, err
		}
	}
	return l, nil
}

// chain returns data with entry among its plugins: in place of our entry if
// there is one, else as the last. It returns data itself if that is so already.
func chain(data []byte, entry Entry) ([]byte, error) {
	l, err := parseConflist(data)
	if err != nil {
		return nil, err
	}
	if !chainable(l.version) {
		return nil, fmt.Errorf("its cniVersion is %q, and plugins can be chained from 0.3.0 on", l.version)
	}
	want, err := json.Marshal(entry)
	if err != nil {
		return nil, err
	}
	if len(l.ours) == 1 {
		p := l.plugins[l.ours[0]]
		if sameJSON(data[p.start:p.end], want) {
			return data, nil
		}
		return slices.Concat(data[:p.start], want, data[p.end:]), nil
	}
	if len(l.ours) > 1 {
		if data, err = unchain(data); err != nil {
			return nil, err
		}
		if l, err = parseConflist(data); err != nil {
			return nil, err
		}
	}
	last := l.plugins[len(l.plugins)-1]
	gap := data[l.gapStart(len(l.plugins)-1):last.start]
	// The gap before an element is white space, after the comma if there is one.
	indent := gap[bytes.IndexByte(gap, ',')+1:]
	return slices.Concat(data[:last.end], []byte(","), indent, want, data[last.end:]), nil
}

// unchain returns data without our entries. It returns data itself if there
// is none, and an error if nothing else would be left.
func unchain(data []byte) ([]byte, error) {
	l, err := parseConflist(data)
	if err != nil {
		return nil, err
	}
	if len(l.ours) == len(l.plugins) {
		return nil, errors.New("it has no plugins but ours")
	}
	for _, i := range slices.Backward(l.ours) {
		cut := span{l.gapStart(i), l.plugins[i].end} // with the comma before it
		if i == 0 {
			cut = span{l.plugins[0].start, l.plugins[1].start} // with the comma after it
		}
		data = slices.Concat(data[:cut.start], data[cut.end:])
	}
	return data, nil
}

// gapStart returns where the text between element i-1 and element i begins.
func (l layout) gapStart(i int) int {
	if i == 0 {
		return l.open
	}
	return l.plugins[i-1].end
}

// derive makes a conflist with entry out of a configuration of a single
// plugin, the way runtimes do in memory.
func derive(data []byte, entry Entry) ([]byte, error) {
	var head struct {
		Name       string `json:"name"`
		CNIVersion string `json:"cniVersion"`
		Type       string `json:"type"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return nil, fmt.Errorf("it is not a JSON object: %v", err)
	}
	if head.Type == "" {
		return nil, errors.New("it has no type")
	}
	if !chainable(head.CNIVersion) {
		return nil, fmt.Errorf("its cniVersion is %q, and plugins can be chained from 0.3.0 on", head.CNIVersion)
	}
	list := struct {
		CNIVersion string            `json:"cniVersion"`
		Name       string            `json:"name"`
		Plugins    []json.RawMessage `json:"plugins"`
	}{head.CNIVersion, head.Name, []json.RawMessage{bytes.TrimSpace(data)}}
	out, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		return nil, err
	}
	return chain(out, entry)
}

// chainable reports whether cniVersion v hands results from plugin to plugin.
// A missing version means 0.2.0 (CNI specification, "Version considerations").
func chainable(v string) bool {
	return v != "" && !strings.HasPrefix(v, "0.1.") && !strings.HasPrefix(v, "0.2.")
}

// sameJSON reports whether a and b mean the same.
func sameJSON(a, b []byte) bool {
	ca, errA := canonical(a)
	cb, errB := canonical(b)
	return errA == nil && errB == nil && bytes.Equal(ca, cb)
}

// canonical writes JSON with sorted keys and without losing digits.
func canonical(b []byte) ([]byte, error) {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("more than one value")
	}
	return json.Marshal(v)
}

// A confFile is one file of the runtime's configuration directory.
type confFile struct {
	name string
	data []byte
}

// An edit is one change to that directory: new content, or removal if data is
// nil.
type edit struct {
	name string
	data []byte
}

// An installation is what has to be done so that the runtime runs our plugin.
type installation struct {
	active  string // the file that the runtime takes, once the edits are made
	edits   []edit
	skipped []string // files that no runtime can use, with the reason
}

// planInstall finds the configuration that the runtime takes, the first usable
// one by name, and plans to chain entry into it. It fails, in words for a
// status, when there is none yet.
func planInstall(files []confFile, entry Entry) (installation, error) {
	var in installation
	files = slices.SortedFunc(slices.Values(files), func(a, b confFile) int { return strings.Compare(a.name, b.name) })
	derived := "" // the derived file that is wanted
	for _, f := range files {
		if isDerived(f.name) {
			continue
		}
		name, data, err := f.name, []byte(nil), error(nil)
		switch path.Ext(f.name) {
		case ".conflist":
			data, err = chain(f.data, entry)
		case ".conf", ".json":
			name = strings.TrimSuffix(f.name, path.Ext(f.name)) + derivedSuffix
			data, err = derive(f.data, entry)
			derived = name
		default:
			continue
		}
		if err != nil {
			derived = ""
			in.skipped = append(in.skipped, fmt.Sprintf("%s: %v", f.name, err))
			continue
		}
		in.active = name
		if i := slices.IndexFunc(files, func(o confFile) bool { return o.name == name }); i < 0 || !bytes.Equal(files[i].data, data) {
			in.edits = append(in.edits, edit{name, data})
		}
		break
	}
	for _, f := range files {
		if isDerived(f.name) && f.name != derived {
			in.edits = append(in.edits, edit{name: f.name})
		}
	}
	if in.active == "" {
		msg := "there is no usable network configuration (*.conflist, *.conf, *.json); install a CNI network plugin, Weft joins its chain"
		if len(in.skipped) > 0 {
			msg += "; passed over " + strings.Join(in.skipped, "; ")
		}
		return in, errors.New(msg)
	}
	return in, nil
}

// planRemove plans to take our plugin out of every file.
func planRemove(files []confFile) []edit {
	var edits []edit
	for _, f := range files {
		if isDerived(f.name) {
			edits = append(edits, edit{name: f.name})
			continue
		}
		if path.Ext(f.name) != ".conflist" {
			continue
		}
		data, err := unchain(f.data)
		if err == nil && !bytes.Equal(data, f.data) {
			edits = append(edits, edit{f.name, data})
		}
	}
	return edits
}

func isDerived(name string) bool { return strings.HasSuffix(name, derivedSuffix) }
