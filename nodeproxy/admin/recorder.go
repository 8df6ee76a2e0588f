package admin

// Recorder is what the data path tells of its connections: every event goes to the trace, the access log and the
// metrics. Observe may be called concurrently and waits for none of them.
type Recorder struct {
	Hub     *Hub
	Access  *AccessLog
	Metrics *Metrics
}

// Observe passes c on to all three.
func (r *Recorder) Observe(c Connection) {
	r.Metrics.Observe(c)
	r.Access.Observe(c)
	r.Hub.Observe(c)
}
