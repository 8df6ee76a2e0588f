package consul

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
)

// stamp changes when a file is written or replaced.
type stamp struct {
	size, modified int64
	inode          uint64
}

func stampOf(path string) (stamp, error) {
	info, err := os.Stat(path)
	if err != nil {
		return stamp{}, err
	}
	return stamp{info.Size(), info.ModTime().UnixNano(), info.Sys().(*syscall.Stat_t).Ino}, nil
}

// tokens are read from files, and again when those change. A file that has gone keeps its token: secrets are replaced by
// removing and writing, and a question in between must not be asked as nobody.
type tokens struct {
	file, dir string

	mu   *sync.Mutex
	read map[string]token // by path
}

type token struct {
	stamp
	text string
}

func newTokens(file, dir string) tokens {
	return tokens{file: file, dir: dir, mu: new(sync.Mutex), read: make(map[string]token)}
}

// own returns the token that a service has for itself, "" for none.
func (t *tokens) own(service string) (string, error) {
	if t.dir == "" || service == "" || !filepath.IsLocal(service) || strings.Contains(service, "/") {
		return "", nil
	}
	text, err := t.from(filepath.Join(t.dir, service))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return text, err
}

// general returns the token for everything else. "" is the anonymous token.
func (t *tokens) general() (string, error) {
	if t.file == "" {
		return "", nil
	}
	return t.from(t.file)
}

func (t *tokens) from(path string) (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	known, have := t.read[path]
	now, err := stampOf(path)
	if err == nil && have && now == known.stamp {
		return known.text, nil
	}
	var text []byte
	if err == nil {
		text, err = os.ReadFile(path)
	}
	switch fresh := strings.TrimSpace(string(text)); {
	case err == nil && fresh != "":
		t.read[path] = token{now, fresh}
		return fresh, nil
	case have:
		return known.text, nil
	case err == nil:
		return "", fmt.Errorf("read token: %s is empty: write the token into it", path)
	default:
		return "", fmt.Errorf("read token: %w", err)
	}
}

// tlsFiles are what an https agent is talked to with. It is not for concurrent use.
type tlsFiles struct {
	ca, cert, key string
	loaded        [3]stamp
}

func (f *tlsFiles) stamps() (stamps [3]stamp) {
	for i, path := range []string{f.ca, f.cert, f.key} {
		stamps[i], _ = stampOf(path) // load says what is wrong
	}
	return stamps
}

func (f *tlsFiles) changed() bool { return f.stamps() != f.loaded }

func (f *tlsFiles) load() (*tls.Config, error) {
	stamps := f.stamps()
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if f.ca != "" {
		pem, err := os.ReadFile(f.ca)
		if err != nil {
			return nil, fmt.Errorf("read ca_file: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read ca_file: %s holds no certificate in PEM", f.ca)
		}
	}
	if f.cert != "" {
		pair, err := tls.LoadX509KeyPair(f.cert, f.key)
		if err != nil {
			return nil, fmt.Errorf("read cert_file and key_file: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	f.loaded = stamps
	return config, nil
}
