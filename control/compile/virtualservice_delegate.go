package compile

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	networking "istio.io/api/networking/v1alpha3"

	"github.com/weft-mesh/weft/mesh"
)

// delegateRules adds the rules of the VirtualService that the rule r delegates
// to. Each holds where both it and r do.
func (v *virtualService) delegateRules(c vsCompiler, path string, r *networking.HTTPRoute, delegates map[mesh.Name]*virtualService) {
	name := mesh.Name{Namespace: cmp.Or(r.GetDelegate().GetNamespace(), v.Name.Namespace), Name: r.GetDelegate().GetName()}
	child := delegates[name]
	broken := ""
	switch {
	case child == nil:
		broken = fmt.Sprintf("there is no VirtualService %s without hosts to delegate to", name)
	case !exported(child.Spec.GetExportTo(), name.Namespace, v.Name.Namespace):
		broken = fmt.Sprintf("VirtualService %s is not exported to namespace %s", name, v.Name.Namespace)
	case child.broken != "":
		broken = fmt.Sprintf("VirtualService %s: %s", name, child.broken)
	case child.found.brokenAt("spec.hosts") != "":
		broken = fmt.Sprintf("VirtualService %s: %s", name, child.found.brokenAt("spec.hosts"))
	}
	if broken != "" {
		v.refs.add("%s.delegate: %s", path, broken)
		out, _ := c.http(path, r)
		out.rule.Broken = broken
		v.addAt(path, nil, out)
		return
	}
	for i, leaf := range child.Spec.GetHttp() {
		at := fmt.Sprintf("spec.http[%d]", i)
		merged := mergeRoutes(r, leaf)
		if merged == nil {
			continue // the two never hold together
		}
		in := c
		in.namespace = name.Namespace // where the destinations are written
		out, _ := in.http(at, merged)
		v.addAt(at, child.found, out)
	}
}

// mergeRoutes returns leaf with what only root says, or nil if they never hold
// together.
func mergeRoutes(root, leaf *networking.HTTPRoute) *networking.HTTPRoute {
	out := proto.CloneOf(leaf)
	if out.Match = mergeMatches(root.GetMatch(), leaf.GetMatch()); out.Match == nil && len(root.GetMatch())+len(leaf.GetMatch()) > 0 {
		return nil
	}
	out.Name = joinNames(root.GetName(), leaf.GetName())
	// What the leaf leaves open, the root may say, but for where requests go.
	from, to := root.ProtoReflect(), out.ProtoReflect()
	for _, name := range []string{"rewrite", "timeout", "retries", "fault", "mirror", "mirrors", "mirror_percent", "mirror_percentage", "cors_policy", "headers"} {
		fd := from.Descriptor().Fields().ByTextName(name)
		if from.Has(fd) && !to.Has(fd) {
			to.Set(fd, from.Get(fd))
		}
	}
	if out.GetRedirect() != nil || out.GetDirectResponse() != nil {
		out.Rewrite, out.Fault = leaf.GetRewrite(), leaf.GetFault()
	}
	if len(leaf.GetMirrors()) > 0 {
		out.Mirror, out.MirrorPercentage = nil, nil
	} else if leaf.GetMirror() != nil {
		out.Mirrors = nil
	}
	return out
}

func joinNames(a, b string) string {
	return strings.Trim(a+"-"+b, "-")
}

// mergeMatches returns every pair that can hold together.
func mergeMatches(roots, leaves []*networking.HTTPMatchRequest) []*networking.HTTPMatchRequest {
	if len(roots) == 0 {
		return leaves
	}
	if len(leaves) == 0 {
		return roots
	}
	var out []*networking.HTTPMatchRequest
	for _, leaf := range leaves {
		for _, root := range roots {
			if !conflict(root, leaf) {
				out = append(out, mergeMatch(root, leaf))
			}
		}
	}
	return out
}

func mergeMatch(root, leaf *networking.HTTPMatchRequest) *networking.HTTPMatchRequest {
	out := proto.CloneOf(leaf)
	out.Name = joinNames(root.GetName(), leaf.GetName())
	out.Uri = cmp.Or(leaf.GetUri(), root.GetUri())
	out.Scheme = cmp.Or(leaf.GetScheme(), root.GetScheme())
	out.Method = cmp.Or(leaf.GetMethod(), root.GetMethod())
	out.Authority = cmp.Or(leaf.GetAuthority(), root.GetAuthority())
	out.Port = cmp.Or(leaf.GetPort(), root.GetPort())
	out.SourceNamespace = cmp.Or(leaf.GetSourceNamespace(), root.GetSourceNamespace())
	out.StatPrefix = cmp.Or(leaf.GetStatPrefix(), root.GetStatPrefix())
	out.IgnoreUriCase = leaf.GetIgnoreUriCase() || root.GetIgnoreUriCase()
	out.Headers = mergeMaps(root.GetHeaders(), leaf.GetHeaders())
	out.WithoutHeaders = mergeMaps(root.GetWithoutHeaders(), leaf.GetWithoutHeaders())
	out.QueryParams = mergeMaps(root.GetQueryParams(), leaf.GetQueryParams())
	out.SourceLabels = mergeMaps(root.GetSourceLabels(), leaf.GetSourceLabels())
	if len(root.GetGateways()) > 0 {
		out.Gateways = root.GetGateways()
	}
	return out
}

func mergeMaps[V any](root, leaf map[string]V) map[string]V {
	if len(root)+len(leaf) == 0 {
		return nil
	}
	out := map[string]V{}
	maps.Copy(out, root)
	maps.Copy(out, leaf)
	return out
}

// conflict reports whether two matches never hold together, or cannot be said
// as one.
func conflict(root, leaf *networking.HTTPMatchRequest) bool {
	if root.GetIgnoreUriCase() != leaf.GetIgnoreUriCase() && root.GetUri() != nil && leaf.GetUri() != nil {
		return true
	}
	texts := textConflict(root.GetUri(), leaf.GetUri()) || textConflict(root.GetScheme(), leaf.GetScheme()) ||
		textConflict(root.GetMethod(), leaf.GetMethod()) || textConflict(root.GetAuthority(), leaf.GetAuthority())
	fields := fieldConflict(root.GetHeaders(), leaf.GetHeaders()) || fieldConflict(root.GetWithoutHeaders(), leaf.GetWithoutHeaders()) ||
		fieldConflict(root.GetQueryParams(), leaf.GetQueryParams())
	differ := func(a, b string) bool { return a != "" && b != "" && a != b }
	labels := false
	for k, val := range root.GetSourceLabels() {
		labels = labels || differ(val, leaf.GetSourceLabels()[k])
	}
	outside := len(root.GetGateways()) > 0 && slices.ContainsFunc(leaf.GetGateways(), func(g string) bool { return !slices.Contains(root.GetGateways(), g) })
	return texts || fields || labels || outside ||
		root.GetPort() != 0 && leaf.GetPort() != 0 && root.GetPort() != leaf.GetPort() ||
		differ(root.GetSourceNamespace(), leaf.GetSourceNamespace()) || differ(root.GetStatPrefix(), leaf.GetStatPrefix())
}

func fieldConflict(root, leaf map[string]*networking.StringMatch) bool {
	for k, m := range root {
		if textConflict(m, leaf[k]) {
			return true
		}
	}
	return false
}

// textConflict reports whether leaf allows anything that root does not: only
// the leaf's is kept where both say something.
func textConflict(root, leaf *networking.StringMatch) bool {
	if root.GetMatchType() == nil || leaf.GetMatchType() == nil {
		return false
	}
	switch r := root.GetMatchType().(type) {
	case *networking.StringMatch_Exact:
		l, ok := leaf.GetMatchType().(*networking.StringMatch_Exact)
		return !ok || l.Exact != r.Exact
	case *networking.StringMatch_Prefix:
		switch l := leaf.GetMatchType().(type) {
		case *networking.StringMatch_Exact:
			return !strings.HasPrefix(l.Exact, r.Prefix)
		case *networking.StringMatch_Prefix:
			return !strings.HasPrefix(l.Prefix, r.Prefix)
		}
	}
	return true // regular expressions cannot be compared
}
