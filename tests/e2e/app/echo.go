package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// echo sends bytes and reads them back, without a half-close, which some proxies do not carry. It prints "echoed N", or
// "not echoed: ERROR" with the errno's name where there is one.
func echo(args []string) error {
	flags := flag.NewFlagSet("echo", flag.ContinueOnError)
	n := flags.Int64("n", 1<<20, "bytes")
	timeout := flags.Duration("timeout", 30*time.Second, "give up after")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := echoOver(flags.Arg(0), *n, *timeout); err != nil {
		fmt.Printf("not echoed: %s\n", errorName(err))
		return nil
	}
	fmt.Printf("echoed %d\n", *n)
	return nil
}

func echoOver(to string, n int64, timeout time.Duration) error {
	conn, err := net.DialTimeout("tcp", to, timeout)
	if err != nil {
		return err
	}
	_ = conn.SetDeadline(time.Now().Add(timeout))
	want := make([]byte, n)
	_, _ = pattern{}.Read(want)
	var sending sync.WaitGroup
	sending.Go(func() { _, _ = conn.Write(append([]byte("echo\n"), want...)) })
	defer sending.Wait()
	defer conn.Close() // ends the writer
	got := make([]byte, n)
	if _, err := io.ReadFull(conn, got); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return errors.New("other bytes came back")
	}
	return nil
}
