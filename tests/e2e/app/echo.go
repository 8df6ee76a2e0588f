package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// echo sends bytes and reads them back at the same time, and with -half ends one after the other way, which some proxies do not carry. It
// prints "echoed N", or "not echoed: ERROR" with the errno's name where there is one.
func echo(args []string) error {
	flags := flag.NewFlagSet("echo", flag.ContinueOnError)
	n := flags.Int64("n", 1<<20, "bytes")
	half := flags.Bool("half", false, "half-close after the last byte, and wait for the other side's end")
	timeout := flags.Duration("timeout", 30*time.Second, "give up after")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := echoOver(flags.Arg(0), *n, *half, *timeout); err != nil {
		fmt.Printf("not echoed: %s\n", errorName(err))
		return nil
	}
	fmt.Printf("echoed %d\n", *n)
	return nil
}

func echoOver(to string, n int64, half bool, timeout time.Duration) error {
	dialled, err := net.DialTimeout("tcp", to, timeout)
	if err != nil {
		return err
	}
	conn := dialled.(*net.TCPConn)
	_ = conn.SetDeadline(time.Now().Add(timeout))
	sent, got := sha256.New(), sha256.New()
	var sending sync.WaitGroup
	sending.Go(func() {
		_, _ = io.WriteString(conn, "echo\n")
		_, _ = io.Copy(conn, io.TeeReader(io.LimitReader(pattern{}, n), sent))
		if half {
			_ = conn.CloseWrite()
		}
	})
	defer sending.Wait()
	defer conn.Close() // ends the writer
	switch read, err := io.CopyN(got, conn, n); {
	case errors.Is(err, io.EOF) && read > 0:
		return io.ErrUnexpectedEOF
	case err != nil:
		return err
	}
	if half {
		if more, err := io.Copy(io.Discard, conn); err != nil || more > 0 {
			return errors.Join(err, fmt.Errorf("%d bytes more came back", more))
		}
	}
	sending.Wait()
	if !bytes.Equal(got.Sum(nil), sent.Sum(nil)) {
		return errors.New("other bytes came back")
	}
	return nil
}
