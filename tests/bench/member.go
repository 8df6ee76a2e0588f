package main

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"
)

// member is the application of a workload that is one of many: it sends back what it gets, and is idle otherwise.
func member(out io.Writer) error {
	ln, err := net.Listen("tcp4", fmt.Sprintf(":%d", servicePort))
	if err != nil {
		return err
	}
	defer ln.Close()
	fmt.Fprintln(out, "listening")
	for {
		conn, err := ln.Accept()
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		go func() {
			defer conn.Close()
			_, _ = io.Copy(conn, conn) // until its client has gone
		}()
	}
}

// retryDial is between two tries of a hold.
const retryDial = 2 * time.Millisecond

// hold keeps a connection, and tells when one that carries a message is open, and when it is cut: a line "open" or "cut" with the time in nanoseconds.
func hold(address string, out io.Writer) error {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("read the address to hold a connection to: %w", err)
	}
	for {
		conn, err := net.DialTimeout("tcp", to.String(), patience)
		if err != nil {
			time.Sleep(retryDial)
			continue
		}
		var b [1]byte
		_, err = conn.Write(b[:])
		if err == nil {
			_, err = io.ReadFull(conn, b[:])
		}
		if err == nil {
			fmt.Fprintln(out, "open", time.Now().UnixNano())
			_, _ = io.ReadFull(conn, b[:]) // nothing comes any more
			fmt.Fprintln(out, "cut", time.Now().UnixNano())
		}
		conn.Close()
		time.Sleep(retryDial)
	}
}
