package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// load makes a number of connections, so many at a time, each of which asks "peer". With -more, or none, it goes on until its stdin
// ends. It prints "done N failed F" and the first failures.
func load(args []string) error {
	flags := flag.NewFlagSet("load", flag.ContinueOnError)
	n := flags.Int64("n", 100, "connections; 0: until stdin ends")
	pause := flags.Duration("pause", 0, "of each that is made at a time, before the next")
	workers := flags.Int("c", 2, "at a time")
	more := flags.Bool("more", false, "go on until stdin ends")
	if err := flags.Parse(args); err != nil {
		return err
	}
	to, err := netip.ParseAddrPort(flags.Arg(0))
	if err != nil {
		return err
	}
	var next, failed, done atomic.Int64
	var enough atomic.Bool
	enough.Store(*n > 0 && !*more)
	if !enough.Load() {
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			enough.Store(true)
		}()
	}
	var working sync.WaitGroup
	for range *workers {
		working.Go(func() {
			for next.Add(1) <= *n || !enough.Load() {
				done.Add(1)
				if err := ask(to); err != nil && failed.Add(1) <= 3 {
					fmt.Printf("failed at %s: %v\n", time.Now().Format(time.StampMilli), err)
				}
				time.Sleep(*pause)
			}
		})
	}
	working.Wait()
	fmt.Printf("done %d failed %d\n", done.Load(), failed.Load())
	return nil
}

func ask(to netip.AddrPort) error {
	conn, err := (&options{}).connect(to, "")
	if err != nil {
		return errors.New(errorName(err))
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := io.WriteString(conn, "peer\n"); err != nil {
		return errors.New(errorName(err))
	}
	text, err := io.ReadAll(conn)
	if err != nil {
		return errors.New(errorName(err))
	}
	if !strings.Contains(string(text), "accept=") {
		return fmt.Errorf("it ends after %q", text)
	}
	return nil
}
