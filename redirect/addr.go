package redirect

import (
	"encoding/binary"
	"net/netip"
)

// The kernel's one form of an address: 16 bytes in network order, IPv4 v4-mapped.

func toAddr(ip netip.Addr) outboundAddr {
	b := ip.As16()
	var a outboundAddr
	for i := range a.W {
		a.W[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return a
}

func fromAddr(a outboundAddr) netip.Addr { return mapped(a).Unmap() }

// mapped leaves IPv4 v4-mapped.
func mapped(a outboundAddr) netip.Addr {
	var b [16]byte
	for i, w := range a.W {
		binary.NativeEndian.PutUint32(b[4*i:], w)
	}
	return netip.AddrFrom16(b)
}

// swap turns a port from host into network order and back.
func swap(port uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], port)
	return binary.BigEndian.Uint16(b[:])
}

func fromEndpoint(a outboundAddr, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(fromAddr(a), swap(port))
}
