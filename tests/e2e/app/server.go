package main

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// serve listens on every address ("inherited" is what a service manager passed on) and answers each connection as its first line says:
//
//	echo     send back what comes, until the client half-closes
//	sum      read to the end, then answer with the number of bytes and their SHA-256
//	send N   send N bytes and close
//	peer     answer with the client's address as accept and getpeername give it, and the local address
//	half     send "bye", half-close, and read on: stdout says how much came
//	reset    reset the connection
//	stream   send a line every 5 ms for ever
//	hold     answer "held" and wait for the client to go
//
// stdout has a line "accepted" for each connection, and "received N by COMMAND: eof" or the error's name when one ends.
func serve(args []string) error {
	flags := flag.NewFlagSet("serve", flag.ContinueOnError)
	first := flags.Bool("first", false, "speak before the client does")
	unixSocket := flags.Bool("unix", false, "the addresses are paths of unix sockets")
	if err := flags.Parse(args); err != nil {
		return err
	}
	network := "tcp"
	if *unixSocket {
		network = "unix"
	}
	var serving sync.WaitGroup
	for _, address := range flags.Args() {
		ln, err := listen(network, address)
		if err != nil {
			return err
		}
		fmt.Println("listening on", ln.Addr())
		serving.Go(func() { accept(ln, *first) })
	}
	fmt.Println("ready")
	serving.Wait()
	return nil
}

func listen(network, address string) (net.Listener, error) {
	if address != "inherited" {
		return net.Listen(network, address)
	}
	const first = 3 // sd_listen_fds(3)
	return net.FileListener(os.NewFile(first, address))
}

var accepted atomic.Uint64

func accept(ln net.Listener, first bool) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return
		}
		fmt.Printf("accepted %d from %s\n", accepted.Add(1), conn.RemoteAddr())
		go func() {
			defer conn.Close()
			if first {
				fmt.Fprintf(conn, "220 hello %s\n", conn.RemoteAddr())
			}
			answer(conn.(stream))
		}()
	}
}

// flicker listens at an address for a moment at a time, and waits for it whenever somebody else has it, until it is killed.
func flicker(args []string) error {
	for first := true; ; time.Sleep(2 * time.Millisecond) {
		ln, err := net.Listen("tcp", args[0])
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			return err
		}
		if first {
			fmt.Println("ready")
			first = false
		}
		time.Sleep(2 * time.Millisecond)
		if err := ln.Close(); err != nil {
			return err
		}
	}
}

// stream is a TCP or a unix connection.
type stream interface {
	net.Conn
	syscall.Conn
	CloseWrite() error
}

func answer(conn stream) {
	in := bufio.NewReader(conn)
	line, err := in.ReadString('\n')
	if err != nil {
		fmt.Printf("ended before a command after %d bytes: %v\n", len(line), err)
		return
	}
	command, argument, _ := strings.Cut(strings.TrimSpace(line), " ")
	var n int64
	switch command {
	case "echo":
		n, err = io.Copy(conn, in)
	case "sum":
		digest := sha256.New()
		n, err = io.Copy(digest, in)
		fmt.Fprintf(conn, "sum %d %x\n", n, digest.Sum(nil))
	case "send":
		size, _ := strconv.ParseInt(argument, 10, 64)
		_, _ = io.Copy(conn, io.LimitReader(pattern{}, size))
	case "peer":
		fmt.Fprintf(conn, "accept=%s getpeername=%s local=%s\n", conn.RemoteAddr(), peerName(conn), conn.LocalAddr())
	case "half":
		fmt.Fprintln(conn, "bye")
		_ = conn.CloseWrite()
		n, err = io.Copy(io.Discard, in)
	case "reset":
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		_ = conn.Close()
	case "stream":
		for err = nil; err == nil; time.Sleep(5 * time.Millisecond) {
			_, err = fmt.Fprintln(conn, "a line of the stream")
		}
	case "hold":
		fmt.Fprintln(conn, "held")
		n, err = io.Copy(io.Discard, in)
	}
	end := "eof"
	if err != nil {
		end = errorName(err)
	}
	fmt.Printf("received %d by %s: %s\n", n, command, end)
}

// pattern is an endless reader of bytes that do not repeat soon.
type pattern struct{}

func (pattern) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return len(b), nil
}

// peerName asks the kernel, where net.Conn remembers what accept said.
func peerName(conn syscall.Conn) string {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err.Error()
	}
	name := "unknown"
	_ = raw.Control(func(fd uintptr) {
		if sa, err := unix.Getpeername(int(fd)); err != nil {
			name = err.Error()
		} else {
			name = addrPort(sa).String()
		}
	})
	return name
}

// udp answers datagrams, or sends one.
func udp(args []string) error {
	if len(args) == 2 {
		conn, err := net.Dial("udp", args[0])
		if err != nil {
			return err
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, args[1]); err != nil {
			return err
		}
		_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		buf := make([]byte, 1500)
		n, err := conn.Read(buf)
		fmt.Printf("answer %s from %s\n", buf[:n], conn.RemoteAddr())
		return err
	}
	conn, err := net.ListenPacket("udp", args[0])
	if err != nil {
		return err
	}
	fmt.Println("ready")
	buf := make([]byte, 1500)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return err
		}
		if _, err := conn.WriteTo(append([]byte("heard "), buf[:n]...), from); err != nil {
			return err
		}
	}
}
