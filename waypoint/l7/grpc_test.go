package l7

import (
	"context"
	"net"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
)

// pipeListener takes what a world's dialer connects to it.
type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

// take hands over a connection and waits for its end.
func (l *pipeListener) take(c net.Conn) {
	w := &waitedConn{Conn: c, closed: make(chan struct{})}
	select {
	case l.conns <- w:
		<-w.closed
	case <-l.done:
	}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

type waitedConn struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func (c *waitedConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// TestGRPCInterop runs the interoperability tests of gRPC through the engine.
func TestGRPCInterop(t *testing.T) {
	w := newWorld(t)
	for _, at := range []string{"10.0.0.1:8081", "10.0.0.2:8081"} {
		l := &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
		s := grpc.NewServer()
		testgrpc.RegisterTestServiceServer(s, interop.NewTestServer())
		go s.Serve(l)
		t.Cleanup(s.Stop)
		w.raw(at, l.take)
	}
	cc, err := grpc.NewClient("passthrough:///cart", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return w.pipe(81), nil }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	tc := testgrpc.NewTestServiceClient(cc)
	for name, f := range map[string]func(context.Context, testgrpc.TestServiceClient, ...grpc.CallOption){
		"empty unary":             interop.DoEmptyUnaryCall,
		"large unary":             interop.DoLargeUnaryCall,
		"client streaming":        interop.DoClientStreaming,
		"server streaming":        interop.DoServerStreaming,
		"ping pong":               interop.DoPingPong,
		"empty stream":            interop.DoEmptyStream,
		"timeout on sleeping":     interop.DoTimeoutOnSleepingServer,
		"cancel after begin":      interop.DoCancelAfterBegin,
		"cancel after first":      interop.DoCancelAfterFirstResponse,
		"custom metadata":         interop.DoCustomMetadata,
		"status code and message": interop.DoStatusCodeAndMessage,
		"special status message":  interop.DoSpecialStatusMessage,
		"unimplemented method": func(ctx context.Context, _ testgrpc.TestServiceClient, _ ...grpc.CallOption) {
			interop.DoUnimplementedMethod(ctx, cc)
		},
		"unimplemented service": func(ctx context.Context, _ testgrpc.TestServiceClient, _ ...grpc.CallOption) {
			interop.DoUnimplementedService(ctx, testgrpc.NewUnimplementedServiceClient(cc))
		},
	} {
		t.Run(name, func(t *testing.T) { f(t.Context(), tc) })
	}
}
