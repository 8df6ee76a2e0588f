package e2e

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/tests/netlab"
)

// slowly is how long a large transfer or a benchmark may take.
const slowly = 5 * time.Minute

// tools finds Debian's programs, and skips or fails as netlab.Require does when one is missing.
func tools(t *testing.T, names ...string) map[string]string {
	t.Helper()
	found := make(map[string]string)
	for _, name := range names {
		path, err := exec.LookPath(name)
		if err != nil {
			for _, pattern := range []string{"/usr/sbin/" + name, "/usr/lib/postgresql/*/bin/" + name} {
				if matches, _ := filepath.Glob(pattern); len(matches) > 0 {
					path = matches[len(matches)-1]
				}
			}
		}
		if path == "" {
			netlab.Lacks(t, name)
		}
		found[name] = path
	}
	return found
}

// client makes the workload from which the programs' clients run.
func client(m *mesh, services ...string) *netlab.Workload {
	m.t.Helper()
	w := m.place(0, "client")
	for _, service := range services {
		m.allow(service, "client")
	}
	return w
}

// server makes a workload on the other node and starts a program in it, which is up once the port answers.
func (m *mesh) server(service string, port uint16, c netlab.Command) *netlab.Workload {
	m.t.Helper()
	w, err := m.Place(1, service, port)
	m.must(err)
	_, err = w.Start(c)
	m.must(err)
	m.listens(w, port)
	return w
}

func (m *mesh) listens(w *netlab.Workload, port uint16) {
	m.t.Helper()
	m.eventually(w.Name+" listens", func() error {
		conn, err := w.Namespace.Dial(m.ctx(), "tcp", at(w.IPv4, port))
		if err == nil {
			err = conn.Close()
		}
		return err
	})
}

// run runs a program in a workload and returns its output.
func (m *mesh) run(w *netlab.Workload, c netlab.Command) string {
	m.t.Helper()
	p, err := w.Start(c)
	m.must(err)
	ctx, cancel := context.WithTimeout(m.t.Context(), slowly)
	defer cancel()
	m.must(p.Wait(ctx))
	return p.Output()
}

func (m *mesh) to(service string, port uint16) string {
	return netip.AddrPortFrom(m.virtual[service], port).String()
}

func TestNginxAndCurl(t *testing.T) {
	tool := tools(t, "nginx", "curl")
	m := newMeshAlone(t)
	w := client(m, "nginx")
	dir := filepath.Join(m.Dir(), "nginx")
	m.must(os.MkdirAll(filepath.Join(dir, "html"), 0o755))
	size, digest := largeFile(t, filepath.Join(dir, "html", "large"))
	m.must(os.WriteFile(filepath.Join(dir, "html", "small"), []byte("small\n"), 0o644))
	conf := filepath.Join(dir, "nginx.conf")
	m.must(os.WriteFile(conf, fmt.Appendf(nil, `daemon off; user root; pid %[1]s/pid; error_log stderr;
events {}
http {
  access_log off;
  client_body_temp_path %[1]s; proxy_temp_path %[1]s; fastcgi_temp_path %[1]s; uwsgi_temp_path %[1]s; scgi_temp_path %[1]s;
  server {
    listen 8080;
    listen [::]:8080;
    root %[1]s/html;
    location /address { return 200 "$remote_addr\n"; }
  }
}
`, dir), 0o644))
	m.server("nginx", port, netlab.Command{Path: tool["nginx"], Args: []string{"-c", conf, "-p", dir}})
	m.start()
	url := "http://" + m.to("nginx", port)

	t.Run("the application sees its client's address", func(t *testing.T) {
		if out := m.in(t).run(w, netlab.Command{Path: tool["curl"], Args: []string{"-sS", url + "/address"}}); out != w.IPv4.String()+"\n" {
			t.Errorf("nginx sees %q, the client is %s", out, w.IPv4)
		}
	})
	t.Run("many requests on one connection", func(t *testing.T) {
		m := m.in(t)
		before := m.metric(0, "nodeproxy_connections_opened_total")
		out := m.run(w, netlab.Command{Path: tool["curl"], Args: []string{"-sS", url + "/small?[1-200]"}})
		if n := strings.Count(out, "small\n"); n != 200 {
			t.Errorf("%d of 200 requests were answered: %.300s", n, out)
		}
		if n := m.metric(0, "nodeproxy_connections_opened_total") - before; n != 1 {
			t.Errorf("they took %v connections", n)
		}
	})
	t.Run("each request on its own connection", func(t *testing.T) {
		m := m.in(t)
		before := m.metric(0, "nodeproxy_connections_opened_total")
		out := m.run(w, netlab.Command{Path: tool["curl"], Args: []string{"-sS", "-H", "Connection: close", url + "/small?[1-200]"}})
		if n := strings.Count(out, "small\n"); n != 200 {
			t.Errorf("%d of 200 requests were answered: %.300s", n, out)
		}
		if n := m.metric(0, "nodeproxy_connections_opened_total") - before; n != 200 {
			t.Errorf("they took %v connections", n)
		}
	})
	t.Run("a gibibyte arrives unchanged", func(t *testing.T) {
		sum := sha256.New()
		p, err := w.Start(netlab.Command{Path: tool["curl"], Args: []string{"-sS", url + "/large"}, Stdout: sum})
		m.must(err)
		ctx, cancel := context.WithTimeout(t.Context(), slowly)
		defer cancel()
		began := time.Now()
		m.must(p.Wait(ctx))
		t.Logf("%.0f MB/s", float64(size)/time.Since(began).Seconds()/1e6)
		if got := fmt.Sprintf("%x", sum.Sum(nil)); got != digest {
			t.Errorf("the checksum is %s, not %s", got, digest)
		}
	})
}

// largeFile writes a gibibyte that does not repeat within a megabyte, and returns its size and SHA-256.
func largeFile(t *testing.T, path string) (int64, string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sum := sha256.New()
	block := make([]byte, 1<<20)
	state := uint32(1)
	for i := range block {
		state = state*1664525 + 1013904223
		block[i] = byte(state >> 24)
	}
	const blocks = 1 << 10
	out := io.MultiWriter(f, sum)
	for i := range blocks {
		copy(block, strconv.Itoa(i))
		if _, err := out.Write(block); err != nil {
			t.Fatal(err)
		}
	}
	return blocks << 20, fmt.Sprintf("%x", sum.Sum(nil))
}

func TestPostgreSQL(t *testing.T) {
	tool := tools(t, "postgres", "initdb", "psql")
	m := newMesh(t)
	w := client(m, "postgres")
	owner, err := user.Lookup("postgres")
	m.must(err)
	uid, err := strconv.Atoi(owner.Uid)
	m.must(err)
	dir, err := os.MkdirTemp("", "nodeproxy-e2e-postgres-") // the lab's own directory is root's alone
	m.must(err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	m.must(os.Chown(dir, uid, uid))
	data := filepath.Join(dir, "data")
	_, err = m.Run(m.ctx(), netlab.Command{Path: tool["initdb"], Args: []string{"-D", data, "-A", "trust", "-U", "postgres", "-N"}, Dir: dir, UID: uint32(uid)})
	m.must(err)
	hba, err := os.OpenFile(filepath.Join(data, "pg_hba.conf"), os.O_APPEND|os.O_WRONLY, 0)
	m.must(err)
	_, err = fmt.Fprintf(hba, "host all all %s/32 trust\n", w.IPv4)
	m.must(err)
	m.must(hba.Close())
	m.server("postgres", 5432, netlab.Command{
		Path: tool["postgres"], Args: []string{"-D", data, "-k", dir, "-c", "listen_addresses=*"}, Dir: dir, UID: uint32(uid),
	})
	m.start()
	query := `create table t as select i, md5(i::text) from generate_series(1, 200000) i; select count(*), max(md5) from t;
		select inet_client_addr(); copy t to stdout`
	host, _ := netip.ParseAddrPort(m.to("postgres", 5432))
	out := m.run(w, netlab.Command{Path: tool["psql"], Args: []string{"-h", host.Addr().String(), "-U", "postgres", "-At", "-c", query}})
	if !strings.Contains(out, "\n200000|") && !strings.HasPrefix(out, "200000|") {
		t.Errorf("the count is not in the answer: %.300s", out)
	}
	if n := strings.Count(out, "\t"); n != 200000 {
		t.Errorf("%d of 200000 rows were copied", n)
	}
	if !strings.Contains(out, w.IPv4.String()) {
		t.Errorf("the server does not see its client's address, %s: %.300s", w.IPv4, out)
	}
}

func TestRedis(t *testing.T) {
	tool := tools(t, "redis-server", "redis-benchmark", "redis-cli")
	m := newMeshAlone(t)
	w := client(m, "redis")
	m.server("redis", 6379, netlab.Command{
		Path: tool["redis-server"], Args: []string{"--port", "6379", "--save", "", "--protected-mode", "no", "--dir", m.Dir()},
	})
	m.start()
	host, _ := netip.ParseAddrPort(m.to("redis", 6379))
	args := []string{"-h", host.Addr().String()}
	out := m.run(w, netlab.Command{Path: tool["redis-benchmark"], Args: append(args, "-n", "10000", "-c", "50", "-t", "set,get,lpush,lrange_100", "-P", "4", "-q")})
	for _, name := range []string{"SET:", "GET:", "LPUSH:", "LRANGE_100"} {
		if !strings.Contains(out, name) || !strings.Contains(out, "requests per second") {
			t.Errorf("redis-benchmark has no result of %s: %s", name, out)
		}
	}
	if out := m.run(w, netlab.Command{Path: tool["redis-cli"], Args: append(args, "client", "list")}); !strings.Contains(out, "addr="+hostPrefix(w.IPv4)) {
		t.Errorf("redis does not see its client's address, %s: %s", w.IPv4, out)
	}
}

func TestIperf3InBothDirections(t *testing.T) {
	tool := tools(t, "iperf3")
	m := newMeshAlone(t)
	w := client(m, "iperf")
	m.server("iperf", 5201, netlab.Command{Path: tool["iperf3"], Args: []string{"-s", "--forceflush"}})
	m.start()
	host, _ := netip.ParseAddrPort(m.to("iperf", 5201))
	for name, more := range map[string][]string{"upload": nil, "download": {"-R"}, "four streams": {"-P", "4"}} {
		t.Run(name, func(t *testing.T) {
			m := m.in(t)
			m.eventually("iperf3 has measured", func() error {
				p, err := w.Start(netlab.Command{Path: tool["iperf3"], Args: append([]string{"-c", host.Addr().String(), "-n", "100M"}, more...)})
				m.must(err)
				err = p.Wait(m.ctx())
				if out := p.Output(); strings.Contains(out, "the server is busy") { // it has not taken leave of the last client yet
					return errNotYet
				} else if err != nil || !strings.Contains(out, "iperf Done.") {
					t.Fatalf("iperf3 did not finish: %v: %s", err, out)
				}
				return nil
			})
		})
	}
}

// TestSMTP has a protocol in which the client says nothing until the server has greeted it.
func TestSMTP(t *testing.T) {
	tool := tools(t, "aiosmtpd", "curl")
	m := newMesh(t)
	w := client(m, "mail")
	mail, err := m.Place(1, "mail", 2525)
	m.must(err)
	server, err := mail.Start(netlab.Command{Path: tool["aiosmtpd"], Args: []string{"-n", "-l", "0.0.0.0:2525"}, Env: []string{"PYTHONUNBUFFERED=1"}})
	m.must(err)
	m.listens(mail, 2525)
	m.start()
	letter := filepath.Join(m.Dir(), "letter")
	m.must(os.WriteFile(letter, []byte("Subject: a letter\r\n\r\n"+strings.Repeat("a line of the letter\r\n", 20000)), 0o644))
	out := m.run(w, netlab.Command{Path: tool["curl"], Args: []string{
		"-sS", "-v", "smtp://" + m.to("mail", 2525), "--mail-from", "web@example.net", "--mail-rcpt", "api@example.net", "-T", letter,
	}})
	if !strings.Contains(out, "< 220 ") || !strings.Contains(out, "< 250 OK") {
		t.Errorf("curl's dialogue is %.2000s", out)
	}
	m.eventually("the letter arrives whole", func() error {
		if n := strings.Count(server.Output(), "a line of the letter"); n != 20000 {
			return fmt.Errorf("%d of 20000 lines: %.300s", n, server.Output())
		}
		return nil
	})
	if !strings.Contains(server.Output(), "X-Peer: ('"+w.IPv4.String()+"'") {
		t.Errorf("the server does not see its client's address, %s: %.300s", w.IPv4, server.Output())
	}
}
