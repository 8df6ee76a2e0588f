package consul

import (
	"context"
	"errors"
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
		ask := func(ctx context.Context, end func()) error {
			answered := make(chan error, 1)
			go func() {
				_, err := c.request(ctx, q)
				answered <- err
			}()
			conn := <-asked
			defer conn.Close()
			if end != nil {
				end()
			}
			err := <-answered
			if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
				t.Fatal(err)
			}
			for buf := make([]byte, 4096); ; {
				if _, err := conn.Read(buf); errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
					t.Errorf("%s: the connection is still there", q.path)
					break
				} else if err != nil {
					break
				}
			}
			if len(c.slots) > 0 {
				t.Errorf("%s: %d slots are taken", q.path, len(c.slots))
			}
			return err
		}
		ctx, cancel := context.WithCancel(t.Context())
		if err := ask(ctx, cancel); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: a question that is called off returns %v", q.path, err)
		}
		if _, now := c.base(); now != first {
			t.Errorf("%s: a question that was called off has the next server asked", q.path)
		}
		ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
		if err := ask(ctx, nil); !errors.Is(err, context.DeadlineExceeded) {
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
