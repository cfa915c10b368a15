package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// A Handler is the agent behind the socket. An error refuses the call; its
// text reaches the pod's events, so it says what to do.
type Handler interface {
	// AddPod captures the pod if it belongs to the mesh and returns when its
	// traffic cannot leave uncaptured any more.
	AddPod(ctx context.Context, r Request) (Response, error)
	// CheckPod fails if the pod should be captured and is not.
	CheckPod(ctx context.Context, r Request) error
	// DelPod lets go of the sandbox. It is idempotent.
	DelPod(ctx context.Context, r Request) error
}

// Serve answers plugins at the unix socket path until ctx ends, then waits for
// the calls under way. It replaces a socket left by an agent before; the file
// stays when it returns, for the agent after. Only root may connect.
func Serve(ctx context.Context, path string, h Handler, log *slog.Logger) error {
	l, err := listen(path)
	if err != nil {
		return err
	}
	srv := &http.Server{
		Handler:           mux(h),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	stopped := make(chan error, 1)
	go func() { stopped <- srv.Serve(rootOnly{l, log}) }()
	select {
	case err := <-stopped:
		return fmt.Errorf("serve the CNI plugin at %s: %v", path, err)
	case <-ctx.Done():
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerTimeout)
	defer cancel()
	err = srv.Shutdown(end)
	<-stopped
	if err != nil {
		return fmt.Errorf("stop serving the CNI plugin: %v", err)
	}
	return nil
}

// listen makes the socket under a name of its own and renames it, so that a
// plugin finds either the old socket or the new one, with the right mode.
func listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("listen for the CNI plugin: %v", err)
	}
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listen for the CNI plugin: %v", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for the CNI plugin: %v", err)
	}
	l.SetUnlinkOnClose(false) // by then the name may be the next agent's
	err = os.Chmod(tmp, 0o600)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		l.Close()
		os.Remove(tmp)
		return nil, fmt.Errorf("listen for the CNI plugin: %v", err)
	}
	return l, nil
}

// rootOnly refuses peers that are not root, whatever the mode of the file.
type rootOnly struct {
	net.Listener
	log *slog.Logger
}

// Accept returns the next connection of a root process, and closes the others.
func (l rootOnly) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		uid, err := peerUID(c)
		if err == nil && uid == 0 {
			return c, nil
		}
		l.log.Warn("refused a connection to the CNI socket: its peer is not root", "uid", uid, "error", err)
		c.Close()
	}
}

func peerUID(c net.Conn) (uint32, error) {
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var inner error
	err = raw.Control(func(fd uintptr) {
		cred, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err = errors.Join(err, inner); err != nil {
		return 0, err
	}
	return cred.Uid, nil
}

func mux(h Handler) http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("POST "+addPath, func(w http.ResponseWriter, r *http.Request) {
		answer(w, r, h.AddPod)
	})
	m.HandleFunc("POST "+checkPath, func(w http.ResponseWriter, r *http.Request) {
		answer(w, r, func(ctx context.Context, q Request) (struct{}, error) { return struct{}{}, h.CheckPod(ctx, q) })
	})
	m.HandleFunc("POST "+delPath, func(w http.ResponseWriter, r *http.Request) {
		answer(w, r, func(ctx context.Context, q Request) (struct{}, error) { return struct{}{}, h.DelPod(ctx, q) })
	})
	return m
}

// answer reads a Request, calls f and writes what came of it.
func answer[T any](w http.ResponseWriter, r *http.Request, f func(context.Context, Request) (T, error)) {
	var q Request
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&q); err != nil {
		write(w, http.StatusBadRequest, refusal{fmt.Sprintf("read the request: %v", err)})
		return
	}
	if q.Namespace == "" || q.Pod == "" || q.ContainerID == "" {
		write(w, http.StatusBadRequest, refusal{"read the request: want namespace, pod and containerID"})
		return
	}
	res, err := f(r.Context(), q)
	if err != nil {
		write(w, http.StatusServiceUnavailable, refusal{err.Error()})
		return
	}
	write(w, http.StatusOK, res)
}

func write(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	// A plugin that went away reads nothing; it tries again.
	_ = json.NewEncoder(w).Encode(v)
}
