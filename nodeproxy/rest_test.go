package nodeproxy

import (
	"io"
	"net"
	"testing"
	"time"

	"nodeproxy.io/policy"
)

// rest waits until both ways of both relays of n connections between applications of m rest.
func (m *mesh) rest(n int) {
	m.t.Helper()
	s := m.proxy.rests
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		s.look()
		s.mu.Lock()
		ways := len(s.resting)
		s.mu.Unlock()
		if ways == 4*n {
			return
		}
		if time.Now().After(end) {
			m.t.Fatalf("%d ways rest, want %d", ways, 4*n)
		}
	}
}

// resting is a connection that rests.
func resting(t *testing.T, path option) (m *mesh, client, server net.Conn) {
	m = newMesh(t, path)
	a := m.app()
	m.instance("api", "api-1", a.addr())
	m.publish()
	client = m.dial(m.origin(apiVIP()))
	say(t, client, "x")
	server = a.accept()
	hear(t, server, "x")
	m.rest(1)
	return m, client, server
}

func TestRestsEndWhenTheyAreClosed(t *testing.T) {
	s, err := newRests()
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() { ended <- s.run() }()
	if err := s.close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestWhatRestsGoesOn(t *testing.T) { onEveryPath(t, testWhatRestsGoesOn) }

func testWhatRestsGoesOn(t *testing.T, path option) {
	m, client, server := resting(t, path)
	for range 3 {
		say(t, server, "y")
		hear(t, client, "y")
		m.rest(1)
		say(t, client, "z")
		hear(t, server, "z")
		m.rest(1)
	}
	if err := client.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(server); err != nil || len(got) > 0 {
		t.Errorf("after a half-close the server reads %q, %v", got, err)
	}
	say(t, server, "last")
	server.Close()
	if got, err := io.ReadAll(client); err != nil || string(got) != "last" {
		t.Errorf("the client reads %q, %v", got, err)
	}
}

func TestAConnectionFollowsOneThatRested(t *testing.T) {
	onEveryPath(t, func(t *testing.T, path option) {
		m := newMesh(t, path)
		a := m.app()
		m.instance("api", "api-1", a.addr())
		m.publish()
		for range 3 {
			client := m.dial(m.origin(apiVIP()))
			say(t, client, "x")
			server := a.accept()
			hear(t, server, "x")
			m.rest(1)
			client.Close()
			if got, err := io.ReadAll(server); err != nil || len(got) > 0 {
				t.Errorf("the server reads %q, %v", got, err)
			}
			server.Close()
		}
	})
}

func TestADenyCutsWhatRests(t *testing.T) {
	onEveryPath(t, func(t *testing.T, path option) {
		m, client, server := resting(t, path)
		m.rule(policy.Deny)
		m.publish()
		wantReset(t, client)
		wantReset(t, server)
	})
}

func TestAResetOfWhatRestsIsPassedOn(t *testing.T) {
	onEveryPath(t, func(t *testing.T, path option) {
		_, client, server := resting(t, path)
		abort(server)
		wantReset(t, client)
	})
}
