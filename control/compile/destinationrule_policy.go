package compile

import (
	"fmt"
	"maps"
	"math"
	"math/big"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	networking "istio.io/api/networking/v1alpha3"

	"github.com/weft-mesh/weft/mesh"
)

// A drCompiler compiles the blocks of one DestinationRule.
type drCompiler struct{ found *findings }

func (c drCompiler) policy(path string, in *networking.TrafficPolicy) *policyBlocks {
	out := &policyBlocks{ports: map[uint16]blocks{}}
	out.blocks = c.blocks(path, in)
	out.budget = c.budget(path+".retryBudget", in.GetRetryBudget())
	if in.GetTunnel() != nil {
		c.found.bad(path+".tunnel", "is not supported, and without the tunnel requests would go another way than was meant")
	}
	if in.GetProxyProtocol() != nil {
		c.found.bad(path+".proxyProtocol", "is not supported, and the endpoints wait for it")
	}
	for _, f := range []string{".tunnel", ".proxyProtocol"} {
		if why := c.found.brokenAt(path + f); why != "" {
			out.broken = why
		}
	}
	for i, p := range in.GetPortLevelSettings() {
		at := fmt.Sprintf("%s.portLevelSettings[%d]", path, i)
		n := p.GetPort().GetNumber()
		if n == 0 || n > 65535 {
			c.found.bad(at+".port.number", "is %d, want 1 to 65535", n)
			continue
		}
		if _, twice := out.ports[uint16(n)]; twice {
			c.found.bad(at+".port.number", "is %d, which is there twice: the first counts", n)
			continue
		}
		out.ports[uint16(n)] = c.blocks(at, p)
	}
	return out
}

// A policyPart is what a policy and a port's policy have in common.
type policyPart interface {
	GetLoadBalancer() *networking.LoadBalancerSettings
	GetConnectionPool() *networking.ConnectionPoolSettings
	GetOutlierDetection() *networking.OutlierDetection
	GetTls() *networking.ClientTLSSettings
}

func (c drCompiler) blocks(path string, in policyPart) blocks {
	out := blocks{
		balance:     c.balance(path+".loadBalancer", in.GetLoadBalancer()),
		connections: c.connections(path+".connectionPool", in.GetConnectionPool()),
		outlier:     c.outlier(path+".outlierDetection", in.GetOutlierDetection()),
		tls:         c.tls(path+".tls", in.GetTls()),
	}
	out.broken = c.found.brokenAt(path + ".tls")
	if lb := in.GetLoadBalancer().GetLocalityLbSetting(); out.outlier == nil && (len(lb.GetFailover()) > 0 || len(lb.GetFailoverPriority()) > 0) {
		c.found.warn(path+".loadBalancer.localityLbSetting", "says where to go when endpoints fail, which nobody notices without outlierDetection beside it")
	}
	return out
}

func (c drCompiler) balance(path string, in *networking.LoadBalancerSettings) *mesh.Balance {
	if in == nil {
		return nil
	}
	out := &mesh.Balance{}
	switch lb := in.GetLbPolicy().(type) {
	case *networking.LoadBalancerSettings_Simple:
		switch lb.Simple {
		case networking.LoadBalancerSettings_ROUND_ROBIN:
			out.Algorithm = mesh.RoundRobin
		case networking.LoadBalancerSettings_RANDOM:
			out.Algorithm = mesh.Random
		case networking.LoadBalancerSettings_PASSTHROUGH:
			out.Algorithm = mesh.Passthrough
		default:
			out.Algorithm = mesh.LeastRequest
		}
	case *networking.LoadBalancerSettings_ConsistentHash:
		c.hash(path+".consistentHash", lb.ConsistentHash, out)
	}
	c.warmup(path, in, out)
	out.Locality = c.locality(path+".localityLbSetting", in.GetLocalityLbSetting())
	if in.GetZoneAwareLbSetting() != nil {
		c.found.warn(path+".zoneAwareLbSetting", "is for sidecars, and waypoints pass it over: use localityLbSetting")
	}
	return out
}

func (c drCompiler) hash(path string, in *networking.LoadBalancerSettings_ConsistentHashLB, out *mesh.Balance) {
	key := &mesh.HashKey{}
	switch k := in.GetHashKey().(type) {
	case *networking.LoadBalancerSettings_ConsistentHashLB_HttpHeaderName:
		key.Header = strings.ToLower(k.HttpHeaderName)
		if !validToken(key.Header) {
			c.found.bad(path+".httpHeaderName", "is %q, want the name of a header", k.HttpHeaderName)
		}
	case *networking.LoadBalancerSettings_ConsistentHashLB_HttpCookie:
		key.Cookie = c.cookie(path+".httpCookie", k.HttpCookie)
	case *networking.LoadBalancerSettings_ConsistentHashLB_UseSourceIp:
		key.SourceIP = k.UseSourceIp
		if !k.UseSourceIp {
			c.found.bad(path+".useSourceIp", "is false, and nothing else says what to hash")
		}
	case *networking.LoadBalancerSettings_ConsistentHashLB_HttpQueryParameterName:
		key.Query = k.HttpQueryParameterName
		if key.Query == "" {
			c.found.bad(path+".httpQueryParameterName", "is empty")
		}
	default:
		c.found.bad(path, "does not say what to hash: give it httpHeaderName, httpCookie, useSourceIp or httpQueryParameterName")
	}
	if c.found.brokenAt(path) != "" {
		return // least request, then
	}
	out.Algorithm, out.Hash = mesh.RingHash, key
	//lint:ignore SA1019 users still write the older form
	out.RingSize = in.GetMinimumRingSize()
	switch a := in.GetHashAlgorithm().(type) {
	case *networking.LoadBalancerSettings_ConsistentHashLB_RingHash_:
		out.RingSize = a.RingHash.GetMinimumRingSize()
	case *networking.LoadBalancerSettings_ConsistentHashLB_Maglev:
		out.Algorithm, out.RingSize, out.TableSize = mesh.Maglev, 0, a.Maglev.GetTableSize()
	}
	if out.RingSize > largestRing {
		c.found.bad(path+".ringHash.minimumRingSize", "is %d, want at most %d", out.RingSize, largestRing)
		out.RingSize = largestRing
	}
	if n := out.TableSize; n != 0 && (n > largestTable || !big.NewInt(int64(n)).ProbablyPrime(0)) {
		c.found.bad(path+".maglev.tableSize", "is %d, want a prime of at most %d, as 65537", n, largestTable)
		out.TableSize = 0
	}
}

// Envoy's bounds of what a hash may take of memory.
const (
	largestRing  = 8 << 20
	largestTable = 5_000_011
)

func (c drCompiler) cookie(path string, in *networking.LoadBalancerSettings_ConsistentHashLB_HTTPCookie) *mesh.HashCookie {
	out := &mesh.HashCookie{Name: in.GetName(), Path: in.GetPath(), Generate: in.GetTtl() != nil}
	if !validToken(out.Name) {
		c.found.bad(path+".name", "is %q, want the name of a cookie", out.Name)
	}
	if d := in.GetTtl(); d != nil {
		if out.TTL = mesh.Duration(d.AsDuration()); out.TTL < 0 {
			c.found.bad(path+".ttl", "is %s, want 0s (until the browser ends) or more", d.AsDuration())
		}
	}
	for i, a := range in.GetAttributes() {
		if !validToken(a.GetName()) || !validFieldValue(a.GetValue()) || strings.Contains(a.GetValue(), ";") {
			c.found.bad(fmt.Sprintf("%s.attributes[%d]", path, i), "is %q, which is no attribute of a cookie", a.GetName()+"="+a.GetValue())
			continue
		}
		out.Attributes = append(out.Attributes, mesh.HeaderPair{Name: a.GetName(), Value: a.GetValue()})
	}
	return out
}

func (c drCompiler) warmup(path string, in *networking.LoadBalancerSettings, out *mesh.Balance) {
	w := &mesh.Warmup{MinimumPercent: 10, Aggression: 1}
	old := in.GetWarmupDurationSecs()
	switch {
	case in.GetWarmup() != nil:
		at := path + ".warmup"
		if in.GetWarmup().GetDuration() == nil {
			c.found.bad(at+".duration", "is missing: say how long an endpoint takes to warm up")
			return
		}
		w.Duration = atLeastMilli(c.found, at+".duration", in.GetWarmup().GetDuration())
		if p := in.GetWarmup().GetMinimumPercent(); p != nil {
			if v := p.GetValue(); !(v >= 0 && v <= 100) {
				c.found.bad(at+".minimumPercent", "is %v, want 0 to 100", v)
			} else {
				w.MinimumPercent = uint32(math.Round(v))
			}
		}
		if a := in.GetWarmup().GetAggression(); a != nil {
			if v := a.GetValue(); !(v >= 1) || math.IsInf(v, 0) {
				c.found.bad(at+".aggression", "is %v, want 1 or more", v)
			} else {
				w.Aggression = v
			}
		}
	case old != nil:
		w.Duration = atLeastMilli(c.found, path+".warmupDurationSecs", old)
	default:
		return
	}
	if out.Algorithm != mesh.RoundRobin && out.Algorithm != mesh.LeastRequest {
		c.found.warn(path+".warmup", "has no effect on %s: use ROUND_ROBIN or LEAST_REQUEST", out.Algorithm)
		return
	}
	if w.Duration > 0 {
		out.Warmup = w
	}
}

func (c drCompiler) locality(path string, in *networking.LocalityLoadBalancerSetting) *mesh.Nearness {
	if in == nil {
		return nil
	}
	out := &mesh.Nearness{Disabled: in.GetEnabled() != nil && !in.GetEnabled().GetValue(), Priority: in.GetFailoverPriority()}
	said := 0
	for _, n := range []int{len(in.GetDistribute()), len(in.GetFailover()), len(in.GetFailoverPriority())} {
		if n > 0 {
			said++
		}
	}
	if said > 1 {
		c.found.bad(path, "has more than one of distribute, failover and failoverPriority: keep one")
		return &mesh.Nearness{Disabled: out.Disabled}
	}
	for i, d := range in.GetDistribute() {
		at := fmt.Sprintf("%s.distribute[%d]", path, i)
		sum := uint64(0)
		for _, k := range slices.Sorted(maps.Keys(d.GetTo())) {
			sum += uint64(d.GetTo()[k])
			c.place(fmt.Sprintf("%s.to[%s]", at, k), k)
		}
		c.place(at+".from", d.GetFrom())
		if sum != 100 {
			c.found.bad(at+".to", "has weights that add up to %d, want 100", sum)
			continue
		}
		out.Distribute = append(out.Distribute, mesh.LocalityShares{From: d.GetFrom(), To: d.GetTo()})
	}
	for i, f := range in.GetFailover() {
		at := fmt.Sprintf("%s.failover[%d]", path, i)
		if f.GetFrom() == f.GetTo() || f.GetFrom() == "" || f.GetTo() == "" || strings.ContainsAny(f.GetFrom()+f.GetTo(), "*/") {
			c.found.bad(at, "goes from %q to %q, want two regions", f.GetFrom(), f.GetTo())
			continue
		}
		out.Failover = append(out.Failover, mesh.LocalityFailover{From: f.GetFrom(), To: f.GetTo()})
	}
	return out
}

// place checks a locality: region/zone/subzone, with a star for the rest.
func (c drCompiler) place(path, l string) {
	parts := strings.Split(l, "/")
	for i, p := range parts {
		if p == "" || strings.Contains(p, "*") && (p != "*" || i != len(parts)-1) || len(parts) > 3 {
			c.found.bad(path, "is %q, want region/zone/subzone, with a star for the rest, as eu/*", l)
			return
		}
	}
}

// forever stands for a duration without an end, where 0 is the default.
const forever = mesh.Duration(10 * 365 * 24 * time.Hour)

// unlessZero reads a duration of which 0 turns a bound off.
func (c drCompiler) unlessZero(path string, d *durationpb.Duration) mesh.Duration {
	if d != nil && d.AsDuration() == 0 {
		return forever
	}
	return atLeastMilli(c.found, path, d)
}

func (c drCompiler) connections(path string, in *networking.ConnectionPoolSettings) *mesh.Connections {
	if in == nil {
		return nil
	}
	out := &mesh.Connections{}
	if t := in.GetTcp(); t != nil {
		at := path + ".tcp"
		out.Max = c.bound(at+".maxConnections", t.GetMaxConnections())
		out.ConnectFor = atLeastMilli(c.found, at+".connectTimeout", t.GetConnectTimeout())
		out.MaxDuration = atLeastMilli(c.found, at+".maxConnectionDuration", t.GetMaxConnectionDuration())
		out.IdleTCP = c.unlessZero(at+".idleTimeout", t.GetIdleTimeout())
		if k := t.GetTcpKeepalive(); k != nil {
			out.Keepalive = &mesh.Keepalive{Probes: k.GetProbes(),
				Time:     c.seconds(at+".tcpKeepalive.time", k.GetTime()),
				Interval: c.seconds(at+".tcpKeepalive.interval", k.GetInterval())}
		}
	}
	if h := in.GetHttp(); h != nil {
		at := path + ".http"
		out.MaxPending = c.bound(at+".http1MaxPendingRequests", h.GetHttp1MaxPendingRequests())
		out.MaxRequests = c.bound(at+".http2MaxRequests", h.GetHttp2MaxRequests())
		out.MaxRequestsPerConn = c.bound(at+".maxRequestsPerConnection", h.GetMaxRequestsPerConnection())
		out.MaxRetries = c.bound(at+".maxRetries", h.GetMaxRetries())
		out.IdleHTTP = c.unlessZero(at+".idleTimeout", h.GetIdleTimeout())
		out.MaxConcurrentStream = c.bound(at+".maxConcurrentStreams", h.GetMaxConcurrentStreams())
		upgrade := h.GetH2UpgradePolicy() == networking.ConnectionPoolSettings_HTTPSettings_UPGRADE
		switch {
		case upgrade && h.GetUseClientProtocol():
			c.found.bad(at, "has both h2UpgradePolicy UPGRADE and useClientProtocol, which exclude each other")
		case upgrade:
			out.HTTP2 = "upgrade"
		case h.GetUseClientProtocol():
			out.HTTP2 = "client"
		}
		if h.GetHttp2KeepAlive() != nil {
			c.found.warn(at+".http2KeepAlive", "is passed over: connections to endpoints are within tunnels, which are kept alive by themselves")
		}
	}
	return out
}

// bound reads a number of which 0 is the default.
func (c drCompiler) bound(path string, n int32) uint32 {
	if n < 0 {
		c.found.bad(path, "is %d, want 0 (the default) or more", n)
		return 0
	}
	return uint32(n)
}

// seconds reads a duration for the kernel, which counts whole seconds.
func (c drCompiler) seconds(path string, d *durationpb.Duration) mesh.Duration {
	if d == nil {
		return 0
	}
	if t := d.AsDuration(); t < time.Second || t%time.Second != 0 {
		c.found.bad(path, "is %s, want whole seconds", t)
		return 0
	}
	return mesh.Duration(d.AsDuration())
}

func (c drCompiler) outlier(path string, in *networking.OutlierDetection) *mesh.Outlier {
	if in == nil {
		return nil
	}
	out := &mesh.Outlier{Consecutive5xx: 5, Interval: mesh.Duration(10 * time.Second), BaseEjection: mesh.Duration(30 * time.Second), MaxEjected: 10}
	if v := in.GetConsecutive_5XxErrors(); v != nil {
		out.Consecutive5xx = v.GetValue()
	}
	out.ConsecutiveGateway = in.GetConsecutiveGatewayErrors().GetValue()
	if out.SplitLocal = in.GetSplitExternalLocalOriginErrors(); out.SplitLocal {
		out.ConsecutiveLocal = 5
		if v := in.GetConsecutiveLocalOriginFailures(); v != nil {
			out.ConsecutiveLocal = v.GetValue()
		}
	} else if in.GetConsecutiveLocalOriginFailures() != nil {
		c.found.warn(path+".consecutiveLocalOriginFailures", "has no effect without splitExternalLocalOriginErrors: true")
	}
	if d := atLeastMilli(c.found, path+".interval", in.GetInterval()); d > 0 {
		out.Interval = d
	}
	if d := atLeastMilli(c.found, path+".baseEjectionTime", in.GetBaseEjectionTime()); d > 0 {
		out.BaseEjection = d
	}
	if p := c.percent(path+".maxEjectionPercent", in.GetMaxEjectionPercent()); p > 0 {
		out.MaxEjected = p
	}
	out.MinHealthPercent = c.percent(path+".minHealthPercent", in.GetMinHealthPercent())
	//lint:ignore SA1019 users still write the older form
	if in.GetConsecutiveErrors() != 0 {
		c.found.warn(path+".consecutiveErrors", "has no effect, and has not had one in Istio for long: use consecutive5xxErrors")
	}
	if len(in.GetOutlierDetectionHttpErrorCodes()) > 0 {
		c.found.bad(path+".outlierDetectionHttpErrorCodes", "is not supported: statuses from 500 on count as errors")
	}
	return out
}

func (c drCompiler) percent(path string, p int32) uint32 {
	if p < 0 || p > 100 {
		c.found.bad(path, "is %d, want 0 to 100", p)
		return 0
	}
	return uint32(p)
}

// tls compiles how connections are secured. What cannot be done as written
// breaks the policy: less security than was asked for is no default.
func (c drCompiler) tls(path string, in *networking.ClientTLSSettings) *mesh.UpstreamTLS {
	if in == nil {
		return nil
	}
	out := &mesh.UpstreamTLS{SNI: in.GetSni(), SubjectAltNames: in.GetSubjectAltNames()}
	switch in.GetMode() {
	case networking.ClientTLSSettings_DISABLE:
		out.Mode = mesh.TLSDisable
	case networking.ClientTLSSettings_SIMPLE:
		out.Mode = mesh.TLSSimple
	case networking.ClientTLSSettings_MUTUAL:
		out.Mode = mesh.TLSMutual
		if in.GetCredentialName() == "" && (in.GetClientCertificate() == "" || in.GetPrivateKey() == "") {
			c.found.bad(path, "is MUTUAL and has no certificate of the client: give it credentialName, or clientCertificate and privateKey")
		}
	case networking.ClientTLSSettings_ISTIO_MUTUAL:
		out.Mode = mesh.TLSMesh
		if in.GetClientCertificate() != "" || in.GetPrivateKey() != "" || in.GetCaCertificates() != "" || in.GetCredentialName() != "" {
			c.found.bad(path, "is ISTIO_MUTUAL, which has the mesh's own certificates: leave out the others")
		}
	default:
		c.found.bad(path+".mode", "is not known")
	}
	for _, f := range []struct{ name, value string }{{"clientCertificate", in.GetClientCertificate()}, {"privateKey", in.GetPrivateKey()}, {"caCrl", in.GetCaCrl()}} {
		if f.value != "" {
			c.found.bad(path+"."+f.name, "is a file of the client, and a waypoint has none: this version of Weft cannot use it")
		}
	}
	if ca := in.GetCaCertificates(); ca != "" && ca != "system" {
		c.found.bad(path+".caCertificates", "is a file of the client, and a waypoint has none: leave it out to trust the system's authorities, or use a BackendTLSPolicy with a ConfigMap")
	}
	if in.GetCredentialName() != "" {
		c.found.bad(path+".credentialName", "names a Secret, which this version of Weft does not give to waypoints")
	}
	if in.GetInsecureSkipVerify().GetValue() {
		c.found.bad(path+".insecureSkipVerify", "is true, and Weft never takes a certificate that it has not verified: name the authority, or use mode DISABLE")
	}
	return out
}

func (c drCompiler) budget(path string, in *networking.TrafficPolicy_RetryBudget) *mesh.RetryBudget {
	if in == nil {
		return nil
	}
	out := &mesh.RetryBudget{Percent: 20, Min: 3}
	if p := in.GetPercent(); p != nil {
		if v := p.GetValue(); !(v >= 0 && v <= 100) {
			c.found.bad(path+".percent", "is %v, want 0 to 100", v)
		} else {
			out.Percent = uint32(math.Round(v))
		}
	}
	if n := in.GetMinRetryConcurrency(); n > 0 {
		out.Min = n
	}
	if d := in.GetBudgetInterval(); d != nil && d.AsDuration() != 0 {
		c.found.warn(path+".budgetInterval", "has no effect: the budget is a share of the requests of the moment")
	}
	return out
}
