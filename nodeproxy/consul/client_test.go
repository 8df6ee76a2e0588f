package consul

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// TestAQuestionThatIsCalledOffLeavesNothingBehind asks a server that never answers, and calls that off: the connection ends, the
// slot is free, and the next question goes to the same server. Only one that is not answered in time goes to the next.
func TestAQuestionThatIsCalledOffLeavesNothingBehind(t *testing.T) {
	var servers []string
	asked := make(chan net.Conn, 10)
	for range 2 {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		servers = append(servers, ln.Addr().String())
		go func() {
			for {
				conn, err := ln.Accept()
				if err != nil {
					return
				}
				asked <- conn
			}
		}()
	}
	c, err := newClient(&Config{Servers: servers})
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	for _, q := range []question{{path: "/v1/status/leader"}, {path: "/v1/catalog/services", index: 7}} {
		_, first := c.base()
		ask := func(ctx context.Context, meanwhile func(net.Conn)) error {
			answered := make(chan error, 1)
			go func() {
				_, err := c.request(ctx, q)
				answered <- err
			}()
			select {
			case conn := <-asked:
				defer conn.Close()
				meanwhile(conn)
			case <-time.After(30 * time.Second):
				t.Fatal("no server is asked")
			}
			err := <-answered
			if len(c.slots) > 0 {
				t.Errorf("%s: %d slots are taken", q.path, len(c.slots))
			}
			return err
		}
		ctx, cancel := context.WithCancel(t.Context())
		calledOff := func(conn net.Conn) {
			if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Read(make([]byte, 1)); err != nil { // before the question is sent, a connection may be kept for the next one
				t.Fatal(err)
			}
			cancel()
			if _, err := io.Copy(io.Discard, conn); isTimeout(err) {
				t.Errorf("%s: the connection is still there", q.path)
			}
		}
		if err := ask(ctx, calledOff); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: a question that is called off returns %v", q.path, err)
		}
		if _, now := c.base(); now != first {
			t.Errorf("%s: a question that was called off has the next server asked", q.path)
		}
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		if err := ask(ctx, func(net.Conn) {}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: a question that is not answered in time returns %v", q.path, err)
		}
		cancel()
		if _, now := c.base(); now != first+1 {
			t.Errorf("%s: after a question that was not answered in time the same server is asked", q.path)
		}
	}
}

func isTimeout(err error) bool {
	e, ok := errors.AsType[net.Error](err)
	return ok && e.Timeout()
}
