package waypoint

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/weft-mesh/weft/hbone"
	"github.com/weft-mesh/weft/identity"
	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/mesh/view"
	"github.com/weft-mesh/weft/waypoint/l7"
)

// hop is the way to an endpoint.
type hop uint8

const (
	reject  hop = iota // the zero plan moves no bytes
	tunnel             // HBONE, to the endpoint's node
	inClear            // plain TCP, to what is outside of the mesh
)

// plan says how an endpoint is connected to.
type plan struct {
	hop     hop
	why     string // of a rejected plan
	address netip.AddrPort
	host    string          // instead of an address: to be resolved
	peers   []mesh.Identity // of whom the other end must prove one
}

func rejected(format string, args ...any) plan { return plan{why: fmt.Sprintf(format, args...)} }

// planDial plans a connection to t from a waypoint on a network. In clear goes
// only what v says is outside of the mesh: what is not known of a workload, or
// has changed since it was chosen, rejects.
func planDial(v *view.View, network string, t l7.Target) plan {
	if !v.Synced() {
		return rejected("nothing is known of the mesh yet")
	}
	w := t.Workload
	if w == nil {
		if w = v.Workload(t.Address.Addr()); w == nil {
			if v.Service(t.Address.Addr()) != nil {
				return rejected("%v is a virtual address of the mesh, and no endpoint", t.Address)
			}
			return plan{hop: inClear, address: t.Address}
		}
	} else if now := v.ByUID(w.UID); now != nil {
		w = now
	} else {
		return rejected("workload %s is gone", w.UID)
	}
	switch {
	case t.Address.Port() == 0:
		return rejected("workload %s has no port for the service", w.UID)
	case w.Network != network:
		return rejected("workload %s is on network %q, and no gateway to it is known", w.UID, w.Network)
	case w.Transport == mesh.PlainTCP && t.Address.Addr().IsValid():
		return plan{hop: inClear, address: t.Address}
	case w.Transport == mesh.PlainTCP && w.Host != "":
		return plan{hop: inClear, host: string(w.Host), address: t.Address}
	case !t.Address.Addr().IsValid():
		return rejected("workload %s has no address", w.UID)
	case w.Transport != mesh.HBONE:
		return rejected("how to reach workload %s is not known: its transport is %v", w.UID, w.Transport)
	case w.Identity.IsZero():
		return rejected("workload %s has no identity: nobody could be verified", w.UID)
	case t.Address.Port() == hbone.Port:
		return rejected("port %d of workload %s is that of its tunnel", t.Address.Port(), w.UID)
	}
	p := plan{hop: tunnel, address: t.Address, peers: []mesh.Identity{w.Identity}}
	if s := v.ServiceByName(t.Service); s != nil {
		for _, name := range s.SubjectAltNames {
			// Names of other kinds are for other protocols.
			if id, err := mesh.ParseIdentity(name); err == nil && !id.IsZero() {
				p.peers = append(p.peers, id)
			}
		}
	}
	return p
}

// connectTimeout bounds what a Dialer's caller does not bound.
const connectTimeout = 10 * time.Second

// A Dialer connects to endpoints in the waypoint's name, with what the
// endpoint may know of the client. It implements l7.Dialer.
type Dialer struct{ proxy *Proxy }

var _ l7.Dialer = Dialer{}

// Dialer returns the way from this waypoint to endpoints. It works while Run
// runs.
func (p *Proxy) Dialer() Dialer { return Dialer{p} }

// Dial connects to t. An endpoint of the mesh is reached through a tunnel whose
// other end must prove to be it, or not at all.
func (d Dialer) Dial(ctx context.Context, t l7.Target) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	v := d.proxy.cfg.View.Load()
	plan := planDial(v, d.proxy.cfg.Network, t)
	if plan.hop == inClear && plan.host != "" {
		return d.dialNamed(ctx, v, plan, t)
	}
	return d.dial(ctx, v, plan, t)
}

// dial does as the plan says, which has an address.
func (d Dialer) dial(ctx context.Context, v *view.View, plan plan, t l7.Target) (net.Conn, error) {
	p := d.proxy
	switch plan.hop {
	case tunnel:
		s, err := p.pool.Connect(ctx, hbone.Target{
			Owner: p.cfg.Pod.Name, Source: p.cfg.ID, Peers: plan.peers,
			Address: netip.AddrPortFrom(plan.address.Addr(), hbone.Port),
		}, plan.address.String(), hbone.Header{Baggage: baggage(v.ByName(p.cfg.Pod), p.cfg.Cluster)})
		if err != nil {
			return nil, err // not a nil *hbone.Stream
		}
		return s, nil
	case inClear:
		return dialOutside(ctx, plan, t)
	default:
		return nil, errors.New("refused: " + plan.why)
	}
}

// dialTunnel connects for the pool. It waits for the certificate first: a
// handshake that waits would keep others from theirs.
func (p *Proxy) dialTunnel(ctx context.Context, t hbone.Target) (net.Conn, error) {
	if _, err := p.cfg.Identity.Certificate(ctx, p.cfg.ID); err != nil {
		return nil, err
	}
	d := net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 180 * time.Second, Interval: 180 * time.Second, Count: 9}}
	return d.DialContext(ctx, "tcp", t.Address.String())
}

// tunnelTLS presents the waypoint's own identity, whatever the target says.
func (p *Proxy) tunnelTLS(t hbone.Target) (*tls.Config, error) {
	return identity.ClientTLS(p.cfg.Identity.Only(p.cfg.ID), p.cfg.Roots, t.Peers), nil
}
