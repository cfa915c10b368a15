package main

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/weft-mesh/weft/e2e/wire"
)

func (d *demo) shop(ctx context.Context) error {
	// A demo that ran before may have left its policy and labels behind.
	if _, err := d.c.Kubectl(ctx, "delete", "namespace", "shop", "web", "--ignore-not-found"); err != nil {
		return err
	}
	if _, err := d.c.KubectlInput(ctx, shopYAML, "apply", "-f", "-"); err != nil {
		return err
	}
	for _, dep := range [][2]string{{"shop", "catalog"}, {"web", "storefront"}, {"web", "visitor"}} {
		if _, err := d.c.Kubectl(ctx, "rollout", "status", "-n", dep[0], "deployment/"+dep[1], "--timeout=90s"); err != nil {
			return err
		}
	}
	if err := d.readPods(ctx); err != nil {
		return err
	}
	for _, p := range d.pods {
		d.say("%-10s %-32s on %s  %v", p.app, p.name, p.node, p.addrs)
	}
	var err error
	d.tap, err = wire.Open(d.c.NodeNetns("node1"), "eth0")
	if err != nil {
		return err
	}
	// Requests made while the catalog's address was still unknown to DNS or
	// kube-proxy do not count: the story begins now.
	if _, err := d.c.Kubectl(ctx, "rollout", "restart", "-n", "web", "deployment/storefront", "deployment/visitor"); err != nil {
		return err
	}
	for _, dep := range []string{"storefront", "visitor"} {
		if _, err := d.c.Kubectl(ctx, "rollout", "status", "-n", "web", "deployment/"+dep, "--timeout=90s"); err != nil {
			return err
		}
	}
	return until(ctx, time.Minute, func() (bool, string, error) {
		if err := d.readPods(ctx); err != nil {
			return false, "", err
		}
		if n := len(d.of("storefront", "visitor", "catalog")); n != 5 {
			return false, fmt.Sprintf("%d pods, want 5", n), nil
		}
		s, err := d.stats(ctx, "storefront")
		return s.OK > 50, fmt.Sprintf("%d answers", s.OK), err
	})
}

func (d *demo) before(ctx context.Context) error {
	since := time.Now()
	var s wire.Sighting
	err := until(ctx, 20*time.Second, func() (ok bool, why string, err error) {
		s, err = d.seen(since)
		return s.Marked >= 10 && s.Tunnel == 0, fmt.Sprintf("%+v", s), err
	})
	if err != nil {
		return fmt.Errorf("plain text between the nodes: %w", err)
	}
	d.say("On the link between the nodes: %d TCP segments, %d of them with %q in clear.", s.Segments, s.Marked, marker)
	return nil
}

func (d *demo) label(ctx context.Context) error {
	at := time.Now()
	if _, err := d.c.Kubectl(ctx, "label", "namespace", "shop", "web", "istio.io/dataplane-mode=ambient"); err != nil {
		return err
	}
	d.say("kubectl label namespace shop web istio.io/dataplane-mode=ambient")
	limit := at.Add(2 * time.Second)
	if err := sleepUntil(ctx, limit); err != nil {
		return err
	}
	var s wire.Sighting
	err := until(ctx, 20*time.Second, func() (ok bool, why string, err error) {
		s, err = d.seen(limit)
		if s.Marked+s.Other > 0 {
			return true, "", err // no use in waiting: what was sent in clear stays sent
		}
		return s.Tunnel >= 100, fmt.Sprintf("%+v", s), err
	})
	if err != nil {
		return fmt.Errorf("traffic in the tunnel: %w", err)
	}
	if s.Marked+s.Other > 0 {
		return fmt.Errorf("two seconds after the label, %d segments outside the tunnel, %d with the order in clear; the first: %s", s.Other, s.Marked, s.FirstOther)
	}
	all, err := d.seen(at)
	if err != nil {
		return err
	}
	if all.TLS13 == 0 {
		return fmt.Errorf("no TLS 1.3 handshake seen among %d segments", all.Segments)
	}
	d.say("From two seconds after the label on: %d TCP segments between the nodes, all of them port %d.", s.Segments, wire.HBONE)
	d.say("TLS 1.3 handshakes seen: %d. Segments with %q in clear: %d.", all.TLS13, marker, s.Marked)
	return d.sameAsBefore(ctx)
}

// sameAsBefore checks that no pod was restarted or replaced, and that every
// one says it is captured.
func (d *demo) sameAsBefore(ctx context.Context) error {
	before := d.pods
	if err := d.readPods(ctx); err != nil {
		return err
	}
	if len(before) != len(d.pods) {
		return fmt.Errorf("%d pods, before the label %d", len(d.pods), len(before))
	}
	for i, p := range d.pods {
		if p.uid != before[i].uid {
			return fmt.Errorf("pod %s was replaced", before[i].name)
		}
	}
	out, err := d.c.Kubectl(ctx, "get", "pods", "-A", "-l", "app in (catalog,storefront,visitor)", "-o",
		`jsonpath={range .items[*]}{.metadata.name} restarts={.status.containerStatuses[0].restartCount} redirection={.metadata.annotations.ambient\.istio\.io/redirection}{"\n"}{end}`)
	if err != nil {
		return err
	}
	d.quote(out)
	if n := strings.Count(out, "restarts=0 redirection=enabled"); n != len(d.pods) {
		return fmt.Errorf("%d of %d pods are captured and were not restarted", n, len(d.pods))
	}
	return nil
}

// log returns what both ztunnels have logged in the last seconds.
func (d *demo) log(ctx context.Context) (string, error) {
	return d.c.Kubectl(ctx, "logs", "-n", "weft-system", "-l", "app=ztunnel", "-c", "istio-proxy", "--since=5s", "--tail=-1")
}

func (d *demo) identities(ctx context.Context) error {
	const from, to = "spiffe://cluster.local/ns/web/sa/storefront", "spiffe://cluster.local/ns/shop/sa/catalog"
	line := regexp.MustCompile(`(?m)^.*src\.identity="` + regexp.QuoteMeta(from) + `".*dst\.identity="` + regexp.QuoteMeta(to) + `".*direction="inbound".*$`)
	return until(ctx, 20*time.Second, func() (bool, string, error) {
		out, err := d.log(ctx)
		found := line.FindString(out)
		if found == "" {
			return false, "no line with both identities in ztunnel's log", err
		}
		d.quote(found)
		d.say("The server's node saw %s", from)
		d.say("and answered as         %s", to)
		return true, "", nil
	})
}

func (d *demo) policy(ctx context.Context) error {
	before, err := d.stats(ctx, "visitor")
	if err != nil {
		return err
	}
	if before.Failed > 0 {
		return fmt.Errorf("the visitor already had %d failures: %s", before.Failed, before.LastError)
	}
	if _, err := d.c.KubectlInput(ctx, policyYAML, "apply", "-f", "-"); err != nil {
		return err
	}
	d.quote(policyYAML)
	front, err := d.stats(ctx, "storefront")
	if err != nil {
		return err
	}
	err = until(ctx, 20*time.Second, func() (bool, string, error) {
		v, err := d.stats(ctx, "visitor")
		if err != nil {
			return false, "", err
		}
		s, err := d.stats(ctx, "storefront")
		return v.Failed >= 5 && s.OK > front.OK+100, fmt.Sprintf("visitor %+v, storefront %+v", v, s), err
	})
	if err != nil {
		return err
	}
	v, err := d.stats(ctx, "visitor")
	if err != nil {
		return err
	}
	d.say("The visitor is refused now: %s", v.LastError)
	if err := d.denial(ctx); err != nil {
		return err
	}
	if _, err := d.c.KubectlInput(ctx, policyYAML, "delete", "-f", "-"); err != nil {
		return err
	}
	d.say("The policy is deleted again.")
	return nil
}

// denial shows the line in which ztunnel says why it refused.
func (d *demo) denial(ctx context.Context) error {
	line := regexp.MustCompile(`(?m)^.*ns/web/sa/visitor.*error=.*(polic|denied).*$`)
	return until(ctx, 20*time.Second, func() (bool, string, error) {
		out, err := d.log(ctx)
		found := line.FindString(out)
		if found != "" {
			d.quote(found)
		}
		return found != "", "no line about the visitor's refusal in ztunnel's log", err
	})
}

func (d *demo) unlabel(ctx context.Context) error {
	if _, err := d.c.Kubectl(ctx, "label", "namespace", "shop", "web", "istio.io/dataplane-mode-"); err != nil {
		return err
	}
	d.say("kubectl label namespace shop web istio.io/dataplane-mode-")
	at := time.Now()
	err := until(ctx, 30*time.Second, func() (bool, string, error) {
		since := time.Now().Add(-500 * time.Millisecond)
		if since.Before(at) {
			return false, "too early", nil
		}
		s, err := d.seen(since)
		return s.Marked >= 5 && s.Tunnel == 0, fmt.Sprintf("%+v", s), err
	})
	if err != nil {
		return fmt.Errorf("plain text between the nodes again: %w", err)
	}
	d.say("After %.1fs the wire shows plain text again, and no tunnel.", time.Since(at).Seconds())
	err = until(ctx, 30*time.Second, func() (bool, string, error) {
		out, err := d.a.Weft(ctx, d.c, "status")
		return strings.Count(out, " installed   0 ") == 2, out, err
	})
	if err != nil {
		return fmt.Errorf("both nodes let their pods go: %w", err)
	}
	d.say("After %.1fs no pod is captured any more. A few more requests, to be sure:", time.Since(at).Seconds())
	s, err := d.stats(ctx, "storefront")
	if err != nil {
		return err
	}
	return until(ctx, 30*time.Second, func() (bool, string, error) {
		now, err := d.stats(ctx, "storefront")
		return now.OK+now.Failed > s.OK+s.Failed+100, fmt.Sprintf("%d requests since", now.OK-s.OK), err
	})
}

func (d *demo) count(ctx context.Context) error {
	if err := d.tap.Close(); err != nil {
		return fmt.Errorf("the capture between the nodes stopped early: %w", err)
	}
	s, err := d.stats(ctx, "storefront")
	if err != nil {
		return err
	}
	d.say("The storefront made %d requests from before the label until now; %d failed.", s.OK+s.Failed, s.Failed)
	if s.Failed > 0 {
		return fmt.Errorf("%d requests failed; the last: %s", s.Failed, s.LastError)
	}
	return nil
}

// sleepUntil waits for a moment that the story itself is about: two seconds
// after the label.
func sleepUntil(ctx context.Context, t time.Time) error {
	timer := time.NewTimer(time.Until(t))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
