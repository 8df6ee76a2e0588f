package admin

import (
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// collector presents Metrics to Prometheus.
type collector struct {
	m *Metrics

	opened, closed, active, bytes, denied, handshake              *prometheus.Desc
	certificateExpiry, sourceAge, unprotected, l7Ignored, refused *prometheus.Desc
	foreign                                                       *prometheus.Desc
	dnsAnswered, dnsForwarded, dnsFailed                          *prometheus.Desc
	unprotectedUDP, eventsLost, repairs, observed                 *prometheus.Desc
	idleTunnels, sourceAddressRejected                            *prometheus.Desc
	tookOver, draining                                            *prometheus.Desc
}

var pairLabels = [...]string{"source_service", "destination_service", "direction", "path"}

func newCollector(m *Metrics) *collector {
	pair := pairLabels[:]
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("nodeproxy_"+name, help, labels, nil)
	}
	return &collector{
		m:         m,
		opened:    desc("connections_opened_total", "Connections that were authorised and delivered.", pair...),
		closed:    desc("connections_closed_total", "Opened connections that ended.", pair...),
		active:    desc("connections_active", "Connections that are open.", pair...),
		bytes:     desc("bytes_total", "Application bytes carried, both ways.", pair...),
		denied:    desc("denied_total", "Connections refused or cut, by reason.", append(slices.Clip(pair), "reason")...),
		observed:  desc("observed_total", "Connections of workloads that are only watched, by the reason for which they would be denied.", append(slices.Clip(pair), "reason")...),
		handshake: desc("handshake_seconds", "Duration of TLS handshakes.", pair...),

		certificateExpiry: desc("certificate_expiry_seconds", "Seconds until the certificate of a local service expires.", "source_service"),
		sourceAge:         desc("source_age_seconds", "Age of the control plane's data; since the start of the daemon while there is none."),
		unprotected:       desc("unprotected_workloads", "Claimed workloads that are not protected now."),
		foreign:           desc("foreign_redirects", "Workloads of which another proxy's rules redirect the connections, by kind of rule.", "source_service", "rule"),
		refused:           desc("refused_claims", "Claims of workloads that are not granted now."),
		l7Ignored:         desc("l7_config_ignored", "HTTP-level configuration of a service that an L4 proxy cannot honour.", "destination_service"),

		unprotectedUDP: desc("unprotected_udp_total", "Datagrams to the ports of workloads, which are let in."),
		repairs:        desc("repairs_total", "Times that what nodeproxy has in the kernel was changed by somebody else, and repaired."),
		eventsLost:     desc("kernel_events_lost_total", "Verdicts and direct connections that trace, log and other counters do not show or show late."),

		dnsAnswered:  desc("dns_answered_total", "Name queries of workloads that were answered from the mesh's definitions."),
		dnsForwarded: desc("dns_forwarded_total", "Name queries of workloads that the name server which they asked has answered."),
		dnsFailed:    desc("dns_failed_total", "Name queries of workloads that were malformed, not answered in time, or one too many."),

		tookOver: desc("handover_timestamp_seconds", "When this daemon took over from the one before; absent where none ran."),
		draining: desc("handover_draining", "1 while the daemon before still carries connections; absent where none ran."),

		idleTunnels:           desc("idle_tunnels", "Tunnels to other nodeproxies that carry no connection.", "direction"),
		sourceAddressRejected: desc("source_address_rejected_total", "Streams of tunnels whose client address was claimed, and not shown to the application."),
	}
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.opened, c.closed, c.active, c.bytes, c.denied, c.handshake,
		c.certificateExpiry, c.sourceAge, c.unprotected, c.foreign, c.refused, c.l7Ignored, c.unprotectedUDP, c.eventsLost, c.repairs, c.observed, c.dnsAnswered, c.dnsForwarded, c.dnsFailed,
		c.idleTunnels, c.sourceAddressRejected, c.tookOver, c.draining} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	c.m.accountLive()
	c.collectStatus(ch)
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	for key, s := range c.m.series {
		c.collectSeries(ch, key, s)
	}
	for service, n := range c.m.ignored {
		ch <- gauge(c.l7Ignored, float64(n), service)
	}
}

func (c *collector) collectSeries(ch chan<- prometheus.Metric, key seriesKey, s *series) {
	labels := []string{key.source, key.destination, string(key.direction), string(key.path)}
	if s.opened > 0 {
		ch <- counter(c.opened, s.opened, labels...)
		ch <- counter(c.closed, s.closed, labels...)
		ch <- counter(c.bytes, s.bytes, labels...)
		ch <- gauge(c.active, float64(s.active), labels...)
	}
	for reason, n := range s.denied {
		ch <- counter(c.denied, n, append(slices.Clip(labels), string(reason))...)
	}
	for reason, n := range s.observed {
		ch <- counter(c.observed, n, append(slices.Clip(labels), string(reason))...)
	}
	if h := &s.handshake; h.count > 0 {
		buckets := make(map[float64]uint64, len(handshakeBuckets))
		for i, bound := range handshakeBuckets {
			buckets[bound] = h.buckets[i]
		}
		ch <- orInvalid(c.handshake)(prometheus.NewConstHistogram(c.handshake, h.count, h.sum, buckets, labels...))
	}
}

func (c *collector) collectStatus(ch chan<- prometheus.Metric) {
	now := time.Now()
	status := c.m.status()
	updated := status.Source.Updated
	if updated.IsZero() {
		updated = status.Started
	}
	ch <- gauge(c.sourceAge, now.Sub(updated).Seconds())
	for _, cert := range status.Certificates {
		if !cert.NotAfter.IsZero() {
			ch <- gauge(c.certificateExpiry, cert.NotAfter.Sub(now).Seconds(), cert.Service)
		}
	}
	unprotected, foreign := 0, make(map[[2]string]int)
	for _, w := range status.Workloads {
		if w.Foreign != "" {
			foreign[[2]string{w.Service, w.Foreign}]++
		}
		if w.Unprotected() {
			unprotected++
		}
	}
	ch <- gauge(c.unprotected, float64(unprotected))
	for of, n := range foreign {
		ch <- gauge(c.foreign, float64(n), of[0], of[1])
	}
	ch <- gauge(c.refused, float64(len(status.Refused)))
	ch <- gauge(c.idleTunnels, float64(status.Connections.Tunnels.Outbound), string(Outbound))
	ch <- gauge(c.idleTunnels, float64(status.Connections.Tunnels.Inbound), string(Inbound))
	ch <- counter(c.sourceAddressRejected, status.Connections.SourceAddressRejected)
	ch <- counter(c.unprotectedUDP, status.Kernel.Counters[CounterUnprotectedUDP])
	ch <- counter(c.repairs, status.Kernel.Repairs)
	ch <- counter(c.eventsLost, status.Kernel.Counters[CounterEventsLost])
	if h := status.Handover; h != nil {
		ch <- gauge(c.tookOver, float64(h.At.UnixMilli())/1000)
		draining := 0.0
		if h.Draining {
			draining = 1
		}
		ch <- gauge(c.draining, draining)
	}
	if q := status.DNS; q != nil {
		ch <- counter(c.dnsAnswered, q.Answered)
		ch <- counter(c.dnsForwarded, q.Forwarded)
		ch <- counter(c.dnsFailed, q.Failed)
	}
}

func counter(d *prometheus.Desc, v uint64, labels ...string) prometheus.Metric {
	return orInvalid(d)(prometheus.NewConstMetric(d, prometheus.CounterValue, float64(v), labels...))
}

func gauge(d *prometheus.Desc, v float64, labels ...string) prometheus.Metric {
	return orInvalid(d)(prometheus.NewConstMetric(d, prometheus.GaugeValue, v, labels...))
}

// orInvalid makes the scrape fail with the error, such as a service name that is not UTF-8, in place of a panic.
func orInvalid(d *prometheus.Desc) func(prometheus.Metric, error) prometheus.Metric {
	return func(m prometheus.Metric, err error) prometheus.Metric {
		if err != nil {
			return prometheus.NewInvalidMetric(d, err)
		}
		return m
	}
}
