package catalog

import "errors"

// Reason says why a connection was refused or ended. It is what counters, trace and the access log carry; none of them
// ever means that bytes went on in plaintext.
type Reason string

// The reasons, each with the sentence an operator reads.
const (
	ReasonIntention       Reason = "intention"         // an intention, or the default, denies the pair
	ReasonUnknownOrigin   Reason = "unknown-origin"    // a connection to our listener that no hook redirected
	ReasonUnknownWorkload Reason = "unknown-workload"  // redirected for a workload that is no longer enrolled
	ReasonClaimRefused    Reason = "claim-refused"     // the workload may not be the service it claims
	ReasonNoCertificate   Reason = "no-certificate"    // no valid leaf for the local service
	ReasonUnknownService  Reason = "unknown-service"   // the destination belongs to no service
	ReasonNoInstance      Reason = "no-instance"       // no healthy instance of the destination
	ReasonConnectFailed   Reason = "connect-failed"    // every instance tried refused or timed out
	ReasonHandshakeFailed Reason = "handshake-failed"  // TLS failed before an identity was known
	ReasonPeerIdentity    Reason = "peer-identity"     // the peer's certificate is not the one expected
	ReasonNotTheWorkloads Reason = "not-the-workloads" // the delivery target is not the workload's own listener
	ReasonDeliveryFailed  Reason = "delivery-failed"   // the application did not accept the connection
	ReasonCapacity        Reason = "capacity"          // a documented limit or map is full
	ReasonPlaintext       Reason = "plaintext"         // plaintext to a strict port
	ReasonNotReady        Reason = "not-ready"         // no listener yet in the workload's network namespace
	ReasonStale           Reason = "stale-heartbeat"   // the daemon is gone or hung
	ReasonBoundDevice     Reason = "bound-to-device"   // SO_BINDTODEVICE: a redirect cannot reach loopback
	ReasonOutsideMesh     Reason = "outside-mesh"      // MeshDestinationsOnly
	ReasonStorage         Reason = "storage"           // the kernel had no memory for the socket's origin
	ReasonConsulAccess    Reason = "consul-access"     // a Consul agent's port, to a workload whose consul_access is "refuse"
	ReasonIdle            Reason = "idle"              // limits.idle passed without a byte
	ReasonDrain           Reason = "drain"             // the daemon's drain deadline passed
	ReasonExisting        Reason = "existing"          // it was older than its workload's enrolment
	ReasonGrantMismatch   Reason = "grant-mismatch"    // a direct connection did not arrive with the addresses it left with
)

// Sentence explains r to an operator; "" for a reason this version does not know.
func (r Reason) Sentence() string { return sentences[r] }

var sentences = map[Reason]string{
	ReasonIntention:       "an intention, or the default policy, denies this source",
	ReasonUnknownOrigin:   "the connection reached our listener without being redirected by us",
	ReasonUnknownWorkload: "the workload that made the connection is not enrolled any more",
	ReasonClaimRefused:    "the configuration does not let this workload be the service it claims",
	ReasonNoCertificate:   "there is no valid certificate for the local service",
	ReasonUnknownService:  "the destination belongs to no service of the mesh",
	ReasonNoInstance:      "the destination has no healthy instance",
	ReasonConnectFailed:   "no instance of the destination accepted the connection",
	ReasonHandshakeFailed: "the TLS handshake failed",
	ReasonPeerIdentity:    "the peer's certificate is not the one this destination or mesh expects",
	ReasonNotTheWorkloads: "the delivery target is not the workload's own listener",
	ReasonDeliveryFailed:  "the application did not accept the connection",
	ReasonCapacity:        "a limit is reached",
	ReasonPlaintext:       "plaintext to a port that takes mTLS only",
	ReasonNotReady:        "the workload's network namespace has no listener yet",
	ReasonStale:           "the daemon has not been seen alive for too long",
	ReasonBoundDevice:     "the socket is bound to a device, so it cannot be redirected",
	ReasonOutsideMesh:     "the destination is not in the mesh, and MeshDestinationsOnly lets workloads reach nothing else",
	ReasonStorage:         "the kernel could not store the socket's origin",
	ReasonConsulAccess:    "consul_access of the workload is \"refuse\": from a Consul agent it would get the certificate of any service",
	ReasonIdle:            "the connection was idle for longer than limits.idle",
	ReasonDrain:           "the daemon stopped and the drain deadline passed",
	ReasonExisting:        "the connection was older than its workload's enrolment, and existing_connections gives it no more time",
	ReasonGrantMismatch:   "the direct connection did not arrive with the addresses it left with: the pair takes the proxy for a while",
}

// Refusal is an error that carries the Reason to report.
type Refusal struct {
	Reason Reason
	Err    error // what was tried, on what, and what to do; may be nil
}

func (r *Refusal) Error() string {
	if r.Err == nil {
		return r.Reason.Sentence()
	}
	return r.Err.Error()
}

func (r *Refusal) Unwrap() error { return r.Err }

// ReasonOf finds the Reason in err, or returns fallback.
func ReasonOf(err error, fallback Reason) Reason {
	if r, ok := errors.AsType[*Refusal](err); ok {
		return r.Reason
	}
	return fallback
}
