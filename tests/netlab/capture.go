package netlab

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// captureBuffer is the kernel's receive buffer of a capture, in bytes: what may arrive while the reader is not scheduled.
const captureBuffer = 64 << 20

// Capture records every packet that crosses a link, in both directions.
type Capture struct {
	fd   int
	stop chan struct{}
	done chan struct{}
	once sync.Once
	rec  Recording
	err  error
}

// Recording is what a Capture saw.
type Recording struct {
	Packets [][]byte // whole frames, from the Ethernet header on
	Dropped uint32   // how many the kernel had no room for: absence proves nothing unless this is 0
}

// Capture starts recording on the named link. The caller ends it with Stop; Close of the Lab does not.
func (n *Namespace) Capture(link string) (*Capture, error) {
	c := &Capture{stop: make(chan struct{}), done: make(chan struct{})}
	err := n.Do(func() (err error) {
		dev, err := net.InterfaceByName(link)
		if err != nil {
			return err
		}
		// Protocol 0 receives nothing until bind, so that no packet of another link slips in before.
		if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
			return err
		}
		return errors.Join(
			unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, captureBuffer),
			unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL), Ifindex: dev.Index}),
		)
	})
	if err != nil {
		return nil, fmt.Errorf("capture on %s: %w", link, err)
	}
	go c.read()
	return c, nil
}

func networkOrder(v uint16) uint16 { return v<<8 | v>>8 }

// read polls with a short timeout, so that Stop needs no second descriptor; it drains the socket before it ends.
func (c *Capture) read() {
	defer close(c.done)
	buf := make([]byte, 1<<17)
	for {
		n, _, err := unix.Recvfrom(c.fd, buf, 0)
		switch {
		case err == nil:
			c.rec.Packets = append(c.rec.Packets, bytes.Clone(buf[:n]))
			continue
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EAGAIN):
			c.err = fmt.Errorf("read a capture: %w", err)
			return
		}
		select {
		case <-c.stop:
			return
		default:
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLIN}}, int((20 * time.Millisecond).Milliseconds()))
		}
	}
}

// Stop ends the capture once it has read what was on the link before the call, and returns all of it.
func (c *Capture) Stop() (*Recording, error) {
	c.once.Do(func() {
		close(c.stop)
		<-c.done
		if stats, err := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS); err == nil {
			c.rec.Dropped = stats.Drops
		} else if c.err == nil {
			c.err = fmt.Errorf("read a capture's statistics: %w", err)
		}
		_ = unix.Close(c.fd)
	})
	return &c.rec, c.err
}

// Contains says whether any single packet holds text. Text that is split over two packets is not found: repeat a short
// marker often, so that one copy is whole.
func (r *Recording) Contains(text []byte) bool {
	for _, packet := range r.Packets {
		if bytes.Contains(packet, text) {
			return true
		}
	}
	return false
}

// TLSRecords counts the packets whose TCP payload begins with the header of a TLS record (RFC 8446, 5.1), by content type:
// 22 handshake, 23 application data.
func (r *Recording) TLSRecords() map[byte]int {
	count := make(map[byte]int)
	for _, packet := range r.Packets {
		payload := tcpPayload(packet)
		if len(payload) >= 5 && payload[0] >= 20 && payload[0] <= 23 && payload[1] == 3 && payload[2] <= 4 {
			count[payload[0]]++
		}
	}
	return count
}

// PayloadBytes is the number of TCP payload bytes on the link, retransmissions included.
func (r *Recording) PayloadBytes() int {
	total := 0
	for _, packet := range r.Packets {
		total += len(tcpPayload(packet))
	}
	return total
}

// tcpPayload finds the payload of a TCP segment in an Ethernet frame, without IPv6 extension headers; nil if there is none.
func tcpPayload(frame []byte) []byte {
	const ethernet, ip6 = 14, 40
	if len(frame) < ethernet+20 {
		return nil
	}
	packet := frame[ethernet:]
	var segment []byte
	switch version := packet[0] >> 4; {
	case version == 4 && packet[9] == unix.IPPROTO_TCP:
		header, total := int(packet[0]&0xf)*4, int(packet[2])<<8|int(packet[3])
		if total == 0 || total > len(packet) { // 0: a segment for the device to cut (TSO)
			total = len(packet)
		}
		if header <= total {
			segment = packet[header:total]
		}
	case version == 6 && len(packet) >= ip6 && packet[6] == unix.IPPROTO_TCP:
		segment = packet[ip6:]
	}
	if len(segment) < 20 {
		return nil
	}
	if offset := int(segment[12]>>4) * 4; offset <= len(segment) {
		return segment[offset:]
	}
	return nil
}
