package capture

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/weft-mesh/weft/internal/testnet"
)

// TestNumbersOfNamespacesProveNothing: a program at the pod's end of the wire
// names the host's namespace by the number that the namespace of the wire has
// for it. Root of a pod can move the wire into a namespace of its own in which
// that number is a third one's, and connect there as if the host began what
// comes from outside. With a helper outside, that would be a connection past
// the mesh.
func TestNumbersOfNamespacesProveNothing(t *testing.T) {
	score := newCard(t)
	for _, guarded := range []bool{false, true} {
		s := newStage(t, testnet.Routed)
		p, _ := s.captured(Mode{New: true})
		if !guarded {
			only(t, p, "")
		}
		pretender := s.world.Host("pretender")
		inner := s.pod.Nest("inner", testnet.NestedMove, func(h *testnet.Host) {
			err := h.Do(func() error {
				nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
				if err != nil {
					return err
				}
				defer nl.Close()
				return nl.SetNetNsIdByFd(pretender.Fd(), p.place.hostNsid)
			})
			if err != nil {
				t.Fatal(err)
			}
		})
		// What it sends would only disturb.
		pretender.Run("nft", "table inet t { chain out { type filter hook output priority 0; drop; }; }")
		app := startApp(t, inner, ":8080")
		for i, way := range [][2]netip.Addr{{s.outside.V4, s.pod.V4}, {s.outside.V6, s.pod.V6}} {
			for round := range 3 {
				from := netip.AddrPortFrom(way[0], uint16(7000+10*i+round))
				to := netip.AddrPortFrom(way[1], 8080)
				pretend(t, pretender, from, to)
				blocked := true
				ctx, cancel := context.WithTimeout(context.Background(), patience(guarded))
				c, err := s.outside.NS.Dial(ctx, "tcp", from, to, nil)
				cancel()
				if err == nil {
					c.SetDeadline(time.Now().Add(2 * patience(guarded)))
					_, err = io.ReadFull(c, make([]byte, 1))
					blocked = err != nil
					c.SetLinger(0)
					c.Close()
				}
				if guarded {
					score.attack("attack.numbers_forged", blocked)
					if !blocked {
						t.Errorf("a process of the pod has sent data to %v, and accepted %v", from, app.accepted())
					}
				} else if blocked {
					t.Errorf("from %v: does not work without the guards either: %v", from, err)
				}
			}
		}
	}
}

// pretend begins a connection and leaves it so.
func pretend(t *testing.T, h *testnet.Host, from, to netip.AddrPort) {
	t.Helper()
	err := h.Do(func() error {
		fd, err := unix.Socket(familyOf(to.Addr()), unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_FREEBIND, 1); err != nil {
			return err
		}
		if to.Addr().Is6() {
			if err := unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1); err != nil {
				return err
			}
		} else if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1); err != nil {
			return err
		}
		if err := unix.Bind(fd, sockaddr(from)); err != nil {
			return err
		}
		if err := unix.Connect(fd, sockaddr(to)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatalf("pretend to connect from %v: %v", from, err)
	}
}
