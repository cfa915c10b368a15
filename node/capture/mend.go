package capture

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Mend puts back what a process in the pod with NET_ADMIN can take away: rules,
// routes, a sysctl, and on some rungs programs. It returns what was missing, in
// words. What is missing lets nothing out that the rung promises to keep in;
// the pod has only cut itself off. Of a pod that is not captured, nothing is
// missing.
//
// Rules that a pod adds before ours are its own affair: they lead to the guards.
func (p *Pod) Mend() (mended []string, err error) {
	p.background.Wait() // what Attach puts on in the background is not missing
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ns == nil {
		return nil, errClosed
	}
	if !exists(filepath.Join(p.dir, pinCaptured)) {
		return nil, nil
	}
	for _, mend := range []func() ([]string, error){p.mendPrograms, p.mendRouting, p.mendSysctl} {
		done, e := mend()
		mended, err = append(mended, done...), errors.Join(err, e)
	}
	if err != nil {
		err = fmt.Errorf("put back what pod %s has lost of its capture: %w", p.uid, err)
	}
	return mended, err
}

func (p *Pod) mendPrograms() (mended []string, err error) {
	for _, h := range p.hooks() {
		on, err := p.on(h)
		if err == nil && !on {
			mended = append(mended, "the program "+h.pin)
			err = p.put(h, p.programs[h.program])
		}
		if err != nil {
			return mended, err
		}
	}
	return mended, nil
}

// mendRouting adds everything: what is there already is refused by the kernel.
func (p *Pod) mendRouting() (mended []string, err error) {
	note := func(err error, what string) error {
		if err == nil {
			mended = append(mended, what)
		}
		if errors.Is(err, unix.EEXIST) {
			return nil
		}
		return err
	}
	err = p.place.add(p.ns, func(nl *netlink.Handle, family int, src net.IP) error {
		lo, err := nl.LinkByIndex(loopback)
		if err != nil {
			return err
		}
		if lo.Attrs().Flags&net.FlagUp == 0 {
			if err := note(nl.LinkSetUp(lo), "lo was down"); err != nil {
				return err
			}
		}
		if err := note(nl.RouteAdd(defaultToLo(family, loopback, src)), fmt.Sprintf("the route of table %d", table)); err != nil {
			return err
		}
		for _, r := range rules(family) {
			if r.Priority == ruleDNS && !p.wantsDNS() {
				continue
			}
			if err := note(nl.RuleAdd(r), fmt.Sprintf("rule %d", r.Priority)); err != nil {
				return err
			}
		}
		return nil
	})
	return mended, err
}

func (p *Pod) mendSysctl() (mended []string, err error) {
	for _, key := range acceptKeys() {
		var was []byte
		err := p.ns.Do(func() (err error) {
			was, err = os.ReadFile(filepath.Join(p.c.cfg.ProcRoot, "sys", key))
			return err
		})
		if err == nil && strings.TrimSpace(string(was)) == "0" {
			mended = append(mended, "the sysctl "+key)
		}
	}
	if len(mended) == 0 {
		return nil, nil
	}
	return mended, p.c.acceptMark(p.ns)
}
