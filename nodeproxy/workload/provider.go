package workload

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
)

// Configured is the provider of the configuration's cgroup blocks.
type Configured []Claim

// Name implements Provider.
func (Configured) Name() string { return "config" }

// Run implements Provider: the claims never change.
func (c Configured) Run(ctx context.Context, claim func([]Claim)) error {
	claim(c)
	<-ctx.Done()
	return nil
}

// Manual is the provider of workloads enrolled by hand. They are kept in a file, so that a restarted daemon knows them.
type Manual struct {
	path string

	mu     sync.Mutex
	claims []Claim
	claim  func([]Claim)
	frozen bool
}

// NewManual reads the workloads enrolled by hand from path; a file that is not there holds none.
func NewManual(path string) (*Manual, error) {
	m := &Manual{path: path}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read workloads enrolled by hand: %w", err)
	}
	if err := json.Unmarshal(data, &m.claims); err != nil {
		return nil, fmt.Errorf("read workloads enrolled by hand from %s: %w: correct or remove the file", path, err)
	}
	return m, nil
}

// Name implements Provider.
func (*Manual) Name() string { return "enroll" }

// Run implements Provider.
func (m *Manual) Run(ctx context.Context, claim func([]Claim)) error {
	m.mu.Lock()
	m.claim = claim
	claim(m.claims)
	m.mu.Unlock()
	<-ctx.Done()
	m.mu.Lock()
	m.claim = nil
	m.mu.Unlock()
	return nil
}

// Claims lists what is enrolled by hand.
func (m *Manual) Claims() []Claim {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.claims)
}

// Enroll claims a cgroup, replacing an earlier claim by hand of the same one.
func (m *Manual) Enroll(c Claim) error {
	c.Provider, c.Cgroup = m.Name(), filepath.Clean(c.Cgroup)
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.replace(append(m.without(c.Cgroup), c))
}

// ErrNotEnrolled says that nobody enrolled the cgroup by hand.
var ErrNotEnrolled = errors.New("it was not enrolled by hand; \"nodeproxy status\" shows who enrolled it")

// Unenroll withdraws a claim by hand, or returns ErrNotEnrolled.
func (m *Manual) Unenroll(cgroup string) error {
	cgroup = filepath.Clean(cgroup)
	m.mu.Lock()
	defer m.mu.Unlock()
	rest := m.without(cgroup)
	if len(rest) == len(m.claims) {
		return fmt.Errorf("un-enroll %s: %w", cgroup, ErrNotEnrolled)
	}
	return m.replace(rest)
}

func (m *Manual) without(cgroup string) []Claim {
	return slices.DeleteFunc(slices.Clone(m.claims), func(c Claim) bool { return c.Cgroup == cgroup })
}

// Freeze has changes refused with ErrHandingOver until it is called again: the daemon that takes over reads the file.
func (m *Manual) Freeze(frozen bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.frozen = frozen
}

// Remember writes claims into a file for a daemon that runs later: whole, by rename.
func Remember(path string, claims any) error {
	data, err := json.MarshalIndent(claims, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	aside := path + ".new"
	if err := os.WriteFile(aside, data, 0o600); err != nil {
		return err
	}
	return os.Rename(aside, path)
}

// replace writes the file before anything changes.
func (m *Manual) replace(claims []Claim) error {
	if m.frozen {
		return ErrHandingOver
	}
	if err := Remember(m.path, claims); err != nil {
		return fmt.Errorf("store workloads enrolled by hand: %w", err)
	}
	m.claims = claims
	if m.claim != nil {
		m.claim(claims)
	}
	return nil
}
