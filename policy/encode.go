package policy

import (
	"bytes"
	"encoding/gob"
	"fmt"
)

// encoded is what a Policy is compiled of.
type encoded struct {
	Generation uint64
	Default    Action
	Local      Identity
	HTTPLike   map[string]bool
	Intentions []Intention
}

// MarshalBinary implements encoding.BinaryMarshaler, for a store that only the same version reads.
func (p *Policy) MarshalBinary() ([]byte, error) {
	var b bytes.Buffer
	err := gob.NewEncoder(&b).Encode(encoded{p.generation, p.def, p.local, p.httpLike, p.Intentions()})
	return b.Bytes(), err
}

// UnmarshalBinary implements encoding.BinaryUnmarshaler: it compiles again what was compiled.
func (p *Policy) UnmarshalBinary(text []byte) error {
	var e encoded
	if err := gob.NewDecoder(bytes.NewReader(text)).Decode(&e); err != nil {
		return fmt.Errorf("read a policy: %w", err)
	}
	compiled, err := Compile(e.Generation, e.Default, e.Local, e.HTTPLike, e.Intentions)
	if err != nil {
		return fmt.Errorf("read a policy: %w", err)
	}
	*p = *compiled
	return nil
}
