package record

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
)

// Secrets takes the application's traffic secrets of one handshake from crypto/tls, as its Config.KeyLogWriter. They are in
// memory and nowhere else.
type Secrets struct{ client, server []byte }

// Write implements io.Writer for a line of the key log.
func (s *Secrets) Write(line []byte) (int, error) {
	fields := bytes.Fields(line)
	if len(fields) != 3 {
		return 0, errors.New("take the secrets of a handshake: the key log has another form")
	}
	var to *[]byte
	switch string(fields[0]) {
	case "CLIENT_TRAFFIC_SECRET_0":
		to = &s.client
	case "SERVER_TRAFFIC_SECRET_0":
		to = &s.server
	default:
		return len(line), nil
	}
	secret := make([]byte, hex.DecodedLen(len(fields[2])))
	if _, err := hex.Decode(secret, fields[2]); err != nil {
		return 0, fmt.Errorf("take the secrets of a handshake: %w", err)
	}
	*to = secret
	return len(line), nil
}

// Layer protects what follows the TLS 1.3 handshake that state is of. It takes the secrets, and may be called once. No record of
// application data may have been read or written before.
func (s *Secrets) Layer(state tls.ConnectionState, client bool) (*Layer, error) {
	in, out := s.client, s.server
	if client {
		in, out = out, in
	}
	s.client, s.server = nil, nil
	if state.Version != tls.VersionTLS13 || !state.HandshakeComplete || in == nil || out == nil {
		return nil, errors.New("protect records: no TLS 1.3 handshake was done with these secrets")
	}
	return newLayer(state.CipherSuite, in, out, client)
}
