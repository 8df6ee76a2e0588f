package consul

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"time"
)

// Issuer issues bearer tokens, JWTs, that an auth method of Consul accepts.
type Issuer struct{ key *ecdsa.PrivateKey }

// NewIssuer makes an issuer with a key of its own.
func NewIssuer() (*Issuer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	return &Issuer{key}, err
}

// AuthMethod makes an auth method that gives whoever has a bearer token of the issuer the policy of the token's name.
func (a *Agent) AuthMethod(ctx context.Context, name string, issuer *Issuer) error {
	der, err := x509.MarshalPKIXPublicKey(issuer.key.Public())
	if err != nil {
		return err
	}
	err = a.Do(ctx, http.MethodPut, "/v1/acl/auth-method", map[string]any{"Name": name, "Type": "jwt", "MaxTokenTTL": "1h", "Config": map[string]any{
		"JWTValidationPubKeys": []string{string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))},
		"JWTSupportedAlgs":     []string{"ES256"}, "BoundAudiences": []string{"consul"}, "ClaimMappings": map[string]string{"sub": "node"},
	}}, nil)
	if err != nil {
		return err
	}
	return a.Do(ctx, http.MethodPut, "/v1/acl/binding-rule", map[string]any{"AuthMethod": name, "BindType": "policy", "BindName": "${value.node}"}, nil)
}

// Bearer is a bearer token, for an hour.
func (i *Issuer) Bearer(subject string) (string, error) {
	now := time.Now()
	claims, err := json.Marshal(map[string]any{"sub": subject, "aud": "consul", "nbf": now.Add(-time.Minute).Unix(), "exp": now.Add(time.Hour).Unix()})
	if err != nil {
		return "", err
	}
	encode := base64.RawURLEncoding.EncodeToString
	signed := encode([]byte(`{"alg":"ES256","typ":"JWT"}`)) + "." + encode(claims)
	sum := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, i.key, sum[:])
	if err != nil {
		return "", err
	}
	signature := make([]byte, 64)
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	return signed + "." + encode(signature), nil
}
