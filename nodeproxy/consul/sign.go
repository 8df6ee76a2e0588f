package consul

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/hashicorp/consul/proto-public/pbconnectca"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// sign has a server sign a certificate for a key that never leaves this process.
func (l *leaves) sign(ctx context.Context, name string) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{l.identity(name).URL()}}, key)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	issued, err := l.client.sign(ctx, name, l.world.current().agent, pemOf("CERTIFICATE REQUEST", request))
	if err != nil {
		return nil, err
	}
	return l.check(name, []byte(issued), pemOf("PRIVATE KEY", der))
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// sign asks the server that is asked everything else, with the token for a service. One that was logged in for and is not
// known any more is replaced once.
func (c *client) sign(ctx context.Context, service string, server *agent, request []byte) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, grace, fmt.Errorf("no answer within %s", grace))
	defer cancel()
	for again := false; ; again = true {
		token, err := c.token(ctx, service)
		if err != nil {
			return "", err
		}
		signed, err := c.signWith(ctx, token, server, request)
		if c.login == nil || again || !isUnknownToken(err) || !c.login.drop(token) {
			return signed, err
		}
	}
}

func (c *client) signWith(ctx context.Context, token string, server *agent, request []byte) (string, error) {
	base, number := c.base()
	conn, at, err := c.dialGRPC(base, server)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	ctx = metadata.AppendToOutgoingContext(ctx, "x-consul-token", token)
	got, err := pbconnectca.NewConnectCAServiceClient(conn).Sign(ctx, &pbconnectca.SignRequest{Csr: string(request)}, grpc.WaitForReady(false))
	if err == nil {
		return got.CertPem, nil
	}
	text := status.Convert(err).Message()
	switch status.Code(err) {
	case codes.PermissionDenied, codes.Unauthenticated:
		return "", &statusError{http.StatusForbidden, text}
	case codes.ResourceExhausted:
		return "", &statusError{http.StatusTooManyRequests, text}
	case codes.Unavailable:
		c.leave(number)
	}
	return "", fmt.Errorf("have %s sign it: %s", at, text)
}

// dialGRPC prepares a connection to the gRPC port of the server whose HTTP API is at base: with TLS if that has it.
func (c *client) dialGRPC(base string, server *agent) (*grpc.ClientConn, string, error) {
	u, err := url.Parse(base)
	if err != nil {
		return nil, "", err
	}
	port, creds := server.grpc, insecure.NewCredentials()
	if c.tls != nil {
		port, creds = server.grpcTLS, credentials.NewTLS(c.http.Load().prompt.TLSClientConfig.Clone())
	}
	switch {
	case port == 0 && c.tls != nil:
		return nil, "", errors.New("the servers do not speak gRPC with TLS: set ports.grpc_tls in their configuration")
	case port == 0:
		return nil, "", errors.New("the servers do not speak gRPC: set ports.grpc in their configuration, or use https:// and ports.grpc_tls")
	}
	at := net.JoinHostPort(strings.Trim(u.Hostname(), "[]"), strconv.Itoa(int(port)))
	conn, err := grpc.NewClient("passthrough:///"+at, grpc.WithTransportCredentials(creds), grpc.WithNoProxy(), grpc.WithDisableServiceConfig())
	return conn, at, err
}
