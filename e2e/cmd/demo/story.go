package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/weft-mesh/weft/e2e/cluster"
	"github.com/weft-mesh/weft/e2e/install"
	"github.com/weft-mesh/weft/e2e/wire"
)

// marker is the text that the storefront sends with every order, as shop.yaml
// has it.
const marker = "weft-demo-secret-order"

// A demo is the state of one run.
type demo struct {
	id    string
	start time.Time
	out   io.Writer
	c     *cluster.Cluster
	a     install.Artifacts
	tap   *wire.Tap
	pods  []pod
}

// A pod is one pod of the application.
type pod struct {
	namespace, name, app, node, uid string
	addrs                           []netip.Addr
}

func (d *demo) title(s string) {
	fmt.Fprintf(d.out, "\n%s  == %s\n", d.clock(), s)
}

func (d *demo) say(format string, args ...any) {
	fmt.Fprintf(d.out, "%s     %s\n", d.clock(), fmt.Sprintf(format, args...))
}

// clock is the time since the demo began.
func (d *demo) clock() string {
	return fmt.Sprintf("%6.1fs", time.Since(d.start).Seconds())
}

// quote prints what a command said.
func (d *demo) quote(s string) {
	for line := range strings.Lines(strings.TrimRight(s, "\n")) {
		fmt.Fprintf(d.out, "           | %s\n", strings.TrimRight(line, "\n"))
	}
}

// until asks hold again and again until it says true, or until the time is up;
// then it fails with what hold said last.
func until(ctx context.Context, limit time.Duration, hold func() (bool, string, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, why, err := hold()
		if ok {
			return nil
		}
		if err != nil {
			why = err.Error()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not within %v: %s", limit, why)
		case <-tick.C:
		}
	}
}

// readPods learns the application's pods and their addresses.
func (d *demo) readPods(ctx context.Context) error {
	out, err := d.c.Kubectl(ctx, "get", "pods", "-A", "-l", "app in (catalog,storefront,visitor)", "-o", "json")
	if err != nil {
		return err
	}
	var list struct {
		Items []struct {
			Metadata struct {
				Name, Namespace, UID string
				Labels               map[string]string
			}
			Spec   struct{ NodeName string }
			Status struct{ PodIPs []struct{ IP netip.Addr } }
		}
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return fmt.Errorf("read the pods: %w", err)
	}
	d.pods = nil
	for _, i := range list.Items {
		p := pod{namespace: i.Metadata.Namespace, name: i.Metadata.Name, uid: i.Metadata.UID, app: i.Metadata.Labels["app"], node: i.Spec.NodeName}
		for _, ip := range i.Status.PodIPs {
			p.addrs = append(p.addrs, ip.IP)
		}
		d.pods = append(d.pods, p)
	}
	return nil
}

// of returns the pods of some apps.
func (d *demo) of(apps ...string) []pod {
	var ps []pod
	for _, p := range d.pods {
		for _, a := range apps {
			if p.app == a {
				ps = append(ps, p)
			}
		}
	}
	return ps
}

// seen sums up what crossed between the nodes since a moment, among all of
// the application's pods.
func (d *demo) seen(since time.Time) (wire.Sighting, error) {
	var addrs []netip.Addr
	for _, p := range d.pods {
		addrs = append(addrs, p.addrs...)
	}
	return d.tap.Between(addrs, []byte(marker), since)
}

// Stats are a client's counters.
type stats struct {
	OK        int
	Failed    int
	LastError string
}

// stats adds up the counters of all pods of an app.
func (d *demo) stats(ctx context.Context, app string) (stats, error) {
	var sum stats
	for _, p := range d.of(app) {
		out, err := d.c.Kubectl(ctx, "exec", "-n", p.namespace, p.name, "--", "/bin/testapp", "stats")
		if err != nil {
			return sum, err
		}
		var s stats
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			return sum, fmt.Errorf("read the counters of %s: %w", p.name, err)
		}
		sum.OK += s.OK
		sum.Failed += s.Failed
		if s.LastError != "" {
			sum.LastError = s.LastError
		}
	}
	return sum, nil
}
