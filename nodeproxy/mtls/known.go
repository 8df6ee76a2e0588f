package mtls

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"sync"
	"time"
)

// maxKnown is how many chains are remembered: some 300 bytes each.
const maxKnown = 4096

// known remembers the chains that were verified, as long as nothing in them expires: with the same roots, the same bytes
// have the same result. That the peer has the key is checked in each handshake all the same.
type known struct {
	mu     sync.Mutex
	chains map[chainKey]verified
}

// chainKey is the hash of all that a verification depends on, but for the roots and the time.
type chainKey [sha256.Size]byte

type verified struct {
	peer Peer
	at   time.Time
}

func keyOf(chain []*x509.Certificate, usage x509.ExtKeyUsage) (key chainKey) {
	h := sha256.New()
	var length [8]byte
	binary.BigEndian.PutUint64(length[:], uint64(usage))
	h.Write(length[:])
	for _, cert := range chain {
		binary.BigEndian.PutUint64(length[:], uint64(len(cert.Raw)))
		h.Write(length[:])
		h.Write(cert.Raw)
	}
	h.Sum(key[:0])
	return key
}

func (k *known) find(key chainKey) (Peer, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	v, ok := k.chains[key]
	if now := time.Now().Round(0); !ok || now.Before(v.at) || now.After(v.peer.until) { // by the wall clock, as certificates are
		return Peer{}, false
	}
	return v.peer, true
}

func (k *known) add(key chainKey, peer Peer) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.chains == nil {
		k.chains = make(map[chainKey]verified)
	}
	for old := range k.chains {
		if len(k.chains) < maxKnown {
			break
		}
		delete(k.chains, old)
	}
	k.chains[key] = verified{peer, time.Now().Round(0)}
}
