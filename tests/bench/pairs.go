package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"nodeproxy.io/tests/netlab"
)

// room is how many connections a peer is configured to have: what its open files allow.
func room() int { return (openFilesLimit() - otherFiles) / 2 }

// files writes one configuration for each side and returns their paths.
func (p *pairing) files(suffix, near, far string) (nearPath, farPath string, err error) {
	nearPath, farPath = filepath.Join(p.dir, "near"+suffix), filepath.Join(p.dir, "far"+suffix)
	if err := os.WriteFile(nearPath, []byte(near), 0o600); err != nil {
		return "", "", err
	}
	return nearPath, farPath, os.WriteFile(farPath, []byte(far), 0o600)
}

func haproxy(p *pairing) (near, far netlab.Command, err error) {
	c := p.credentials
	const version = "ssl-min-ver TLSv1.3 ciphersuites TLS_AES_128_GCM_SHA256"
	return haproxyPair(p, fmt.Sprintf("ssl crt %s ca-file %s verify required verifyhost far "+version, c.near.both, c.root),
		fmt.Sprintf("ssl crt %s ca-file %s verify required "+version, c.far.both, c.root))
}

func plainHAProxy(p *pairing) (near, far netlab.Command, err error) { return haproxyPair(p, "", "") }

// haproxyPair follows "Configuration Manual", sections 3 to 5. What the two are told of TLS is in dial and in listen.
func haproxyPair(p *pairing, dial, listen string) (near, far netlab.Command, err error) {
	const head = `global
  maxconn %d
defaults
  mode tcp
  timeout connect 5s
  timeout client 1h
  timeout server 1h
`
	nearPath, farPath, err := p.files(".cfg", fmt.Sprintf(head+`listen near
  bind %s
  server far %s %s
`, room(), p.near, p.far, dial), fmt.Sprintf(head+`listen far
  bind %s %s
  server application %s
`, room(), p.far, listen, p.to))
	return netlab.Command{Args: []string{"-db", "-f", nearPath}}, netlab.Command{Args: []string{"-db", "-f", farPath}}, err
}

// nginx follows the documentation of ngx_stream_ssl_module and ngx_stream_proxy_module. Each worker has room for all connections, of
// which it counts both ends: they may be anything but shared out evenly.
func nginx(p *pairing) (near, far netlab.Command, err error) {
	const head = `load_module /usr/lib/nginx/modules/ngx_stream_module.so;
user root;
daemon off;
worker_processes auto;
worker_rlimit_nofile %d;
pid %s/%s.pid;
error_log stderr;
events { worker_connections %d; }
stream {
  proxy_timeout 1h;
`
	c := p.credentials
	nearPath, farPath, err := p.files(".conf", fmt.Sprintf(head+`  server {
    listen %s;
    proxy_pass %s;
    proxy_ssl on;
    proxy_ssl_protocols TLSv1.3;
    proxy_ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
    proxy_ssl_certificate %s;
    proxy_ssl_certificate_key %s;
    proxy_ssl_trusted_certificate %s;
    proxy_ssl_verify on;
    proxy_ssl_name far;
  }
}
`, openFilesLimit(), p.dir, "near", 2*room(), p.near, p.far, c.near.certificate, c.near.key, c.root), fmt.Sprintf(head+`  server {
    listen %s ssl;
    ssl_protocols TLSv1.3;
    ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
    ssl_certificate %s;
    ssl_certificate_key %s;
    ssl_client_certificate %s;
    ssl_verify_client on;
    proxy_pass %s;
  }
}
`, openFilesLimit(), p.dir, "far", 2*room(), p.far, c.far.certificate, c.far.key, c.root, p.to))
	return netlab.Command{Args: []string{"-p", p.dir, "-e", "stderr", "-c", nearPath}}, netlab.Command{Args: []string{"-p", p.dir, "-e", "stderr", "-c", farPath}}, err
}

// stunnel follows stunnel(8).
func stunnel(p *pairing) (near, far netlab.Command, err error) {
	const text = `foreground = yes
pid =
syslog = no
[%s]
client = %s
accept = %s
connect = %s
cert = %s
key = %s
CAfile = %s
verifyChain = yes
sslVersionMin = TLSv1.3
ciphersuites = TLS_AES_128_GCM_SHA256
`
	c := p.credentials
	nearPath, farPath, err := p.files(".conf",
		fmt.Sprintf(text+"checkHost = far\n", "near", "yes", p.near, p.far, c.near.certificate, c.near.key, c.root),
		fmt.Sprintf(text, "far", "no", p.far, p.to, c.far.certificate, c.far.key, c.root))
	return netlab.Command{Args: []string{nearPath}}, netlab.Command{Args: []string{farPath}}, err
}

// consulProxy is Consul's built-in proxy, with certificates of its own agent's CA, which are EC P-256 too.
func consulProxy(p *pairing) (near, far netlab.Command, err error) {
	common := []string{"connect", "proxy", "-http-addr", p.consul, "-log-level", "warn"}
	return netlab.Command{Args: append(common[:len(common):len(common)], "-service", "near", "-upstream", fmt.Sprintf("far:%s", p.near))},
		netlab.Command{Args: append(common[:len(common):len(common)], "-service", "far", "-service-addr", p.to.String(), "-listen", p.far.String(), "-register")}, nil
}

type object = map[string]any

func envoy(p *pairing) (near, far netlab.Command, err error) {
	return envoyPair(p, object{"sni": "far"})
}

func envoyWithoutSessions(p *pairing) (near, far netlab.Command, err error) {
	return envoyPair(p, object{"sni": "far", "max_session_keys": 0})
}

// envoyPair follows the v3 API: listener.v3.Listener, tcp_proxy.v3.TcpProxy, tls.v3. What is added to the client's side of TLS is in
// upstream.
func envoyPair(p *pairing, upstream object) (near, far netlab.Command, err error) {
	const api = "type.googleapis.com/envoy.extensions."
	address := func(host string, port uint16) object {
		return object{"socket_address": object{"address": host, "port_value": port}}
	}
	tls := func(kind string, id identity, more object) object {
		context := object{
			"@type": api + "transport_sockets.tls.v3." + kind + "TlsContext",
			"common_tls_context": object{
				"tls_params":         object{"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
				"tls_certificates":   []object{{"certificate_chain": object{"filename": id.certificate}, "private_key": object{"filename": id.key}}},
				"validation_context": object{"trusted_ca": object{"filename": p.credentials.root}},
			},
		}
		for k, v := range more {
			context[k] = v
		}
		return object{"name": "envoy.transport_sockets.tls", "typed_config": context}
	}
	bootstrap := func(at, to object, inbound, outbound object) (string, error) {
		chain := object{"filters": []object{{"name": "tcp", "typed_config": object{
			"@type": api + "filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": "tcp", "cluster": "next", "idle_timeout": "0s",
		}}}}
		if inbound != nil {
			chain["transport_socket"] = inbound
		}
		next := object{
			"name": "next", "type": "STATIC", "connect_timeout": "5s",
			"circuit_breakers": object{"thresholds": []object{{"max_connections": room(), "max_pending_requests": room()}}},
			"load_assignment":  object{"cluster_name": "next", "endpoints": []object{{"lb_endpoints": []object{{"endpoint": object{"address": to}}}}}},
		}
		if outbound != nil {
			next["transport_socket"] = outbound
		}
		text, err := json.MarshalIndent(object{"static_resources": object{
			"listeners": []object{{"name": "here", "address": at, "filter_chains": []object{chain}}},
			"clusters":  []object{next},
		}}, "", "  ")
		return string(text), err
	}
	meet := address(p.far.Addr().String(), p.far.Port())
	nearText, err := bootstrap(address(p.near.Addr().String(), p.near.Port()), meet, nil, tls("Upstream", p.credentials.near, upstream))
	if err != nil {
		return near, far, err
	}
	farText, err := bootstrap(meet, address(p.to.Addr().String(), p.to.Port()), tls("Downstream", p.credentials.far, object{"require_client_certificate": true}), nil)
	if err != nil {
		return near, far, err
	}
	nearPath, farPath, err := p.files(".json", nearText, farText)
	args := func(path string) netlab.Command {
		return netlab.Command{Args: []string{"-c", path, "--log-level", "error", "--disable-hot-restart", "--concurrency", "2"}}
	}
	return args(nearPath), args(farPath), err
}
