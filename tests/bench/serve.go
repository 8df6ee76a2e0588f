package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// A connection carries messages of messageSize bytes, of which the first says what the client wants:
const (
	echo byte = 'e' // the message is sent back
	sink byte = 's' // blocks follow, of which the first byte of the last is lastBlock; they are counted and answered with the count, in 8 bytes
	pour byte = 'p' // bytes are sent for the nanoseconds in message[1:9], then their count, in 8 bytes, and the end
	park byte = 'k' // the message is sent back, and the connection then costs the server no thread
)

const (
	messageSize = 128
	countSize   = 8
	bulkSize    = 64 << 10 // of one system call, and of a block
)

// lastBlock says that no block follows: not all proxies pass a half-close on.
const lastBlock = 1

type message [messageSize]byte

// serverThreads is more than the connections that are busy at a time: each of them blocks a thread of its own, which also
// accepted it, so that a connection costs the server one wake-up.
const serverThreads = 128

// serve answers clients at an address until the process is killed.
func serve(address string, out io.Writer) error {
	runtime.GOMAXPROCS(serverThreads)
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("read the address to serve: %w", err)
	}
	ln, err := listen(at)
	if err != nil {
		return err
	}
	defer ln.close()
	parked, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open epoll: %w", err)
	}
	defer unix.Close(parked)
	go closeParked(parked) // ends with the process
	fmt.Fprintln(out, "listening")
	return together(serverThreads, func(int) error {
		for {
			conn, err := ln.accept()
			if err != nil {
				return fmt.Errorf("accept: %w", err)
			}
			answer(conn, parked)
		}
	})
}

// answer serves one connection. What fails ends it, and the client says so.
func answer(conn socket, parked int) {
	var m message
	for {
		if _, err := io.ReadFull(conn, m[:]); err != nil {
			break
		}
		if m[0] == sink {
			countInto(conn)
			break
		}
		if m[0] == pour {
			pourInto(conn, time.Duration(binary.BigEndian.Uint64(m[1:])))
			break
		}
		if _, err := conn.Write(m[:]); err != nil {
			break
		}
		if m[0] == park && unix.EpollCtl(parked, unix.EPOLL_CTL_ADD, int(conn), &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(conn)}) == nil {
			return
		}
	}
	conn.close()
}

func countInto(conn socket) {
	buf := make([]byte, bulkSize)
	var total uint64
	for last := false; !last || total%bulkSize != 0; {
		n, err := conn.Read(buf)
		if err != nil {
			return
		}
		if first := (bulkSize - total%bulkSize) % bulkSize; first < uint64(n) { // where a block begins: there is one at most
			last = buf[first] == lastBlock
		}
		total += uint64(n)
	}
	_, _ = conn.Write(binary.BigEndian.AppendUint64(nil, total)) // without it the client fails
}

func pourInto(conn socket, d time.Duration) {
	buf := make([]byte, bulkSize)
	var total uint64
	deadline := time.Now().Add(d)
	for more := true; more; more = time.Now().Before(deadline) {
		n, err := conn.Write(buf)
		total += uint64(n)
		if err != nil {
			return
		}
	}
	_, _ = conn.Write(binary.BigEndian.AppendUint64(nil, total)) // without it the client fails
}

// closeParked closes what its client closes.
func closeParked(parked int) {
	events := make([]unix.EpollEvent, 64)
	for {
		n, err := unix.EpollWait(parked, events, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
		for _, e := range events[:max(n, 0)] {
			socket(e.Fd).close()
		}
	}
}
