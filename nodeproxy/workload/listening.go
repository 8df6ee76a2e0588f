package workload

import (
	"sync"
	"time"

	"nodeproxy.io/redirect"
)

// lookedFor is how long the listeners of a port are taken to be what they were: the kernel walks all of its listeners to find
// them, which would be a tenth of what a delivery costs.
const lookedFor = 10 * time.Millisecond

// listening remembers the listeners of a namespace to which was delivered. Who has taken a port since is found out when the one who accepted is
// looked at, which is done for each connection.
type listening struct {
	mu    sync.Mutex
	ports map[uint16]looked
}

type looked struct {
	listeners []redirect.Socket
	until     time.Time
}

func (l *listening) find(port uint16) ([]redirect.Socket, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	at, ok := l.ports[port]
	if ok && time.Now().After(at.until) {
		delete(l.ports, port)
		return nil, false
	}
	return at.listeners, ok
}

func (l *listening) add(port uint16, listeners []redirect.Socket, seen time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ports == nil {
		l.ports = make(map[uint16]looked)
	}
	l.ports[port] = looked{listeners, seen.Add(lookedFor)}
}
