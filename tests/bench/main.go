// Command bench measures nodeproxy end to end beside plain TCP and pairs of other mTLS proxies, on two nodes made of network
// namespaces on this machine.
//
// Shared machines change speed, so nothing is compared across time: every round measures each path once, one right after
// the other, and the report gives the medians of the ratios within a round. The load is a closed loop of blocking system
// calls, so that it costs as little as a client can.
//
//	go -C tests/bench run . -nodeproxy ../../build/nodeproxy            the tables, after some twenty minutes
//	go -C tests/bench run . -nodeproxy ../../build/nodeproxy -smoke     one tiny round: does all of it still work?
//	go -C tests/bench run . scale -nodeproxy ../../build/nodeproxy      a node of a large mesh, after some ten minutes
//
// Before it measures, it proves by the daemons' own trace that each path carries its bytes the way it claims, and that the peers do
// mTLS of the same kind.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"nodeproxy.io/tests/netlab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// run is the command. The roles "load", "serve", "member" and "hold" are what it starts of itself inside the lab.
func run(ctx context.Context, args []string, out io.Writer) error {
	if len(args) == 2 {
		switch args[0] {
		case "load":
			var o order
			if err := json.Unmarshal([]byte(args[1]), &o); err != nil {
				return fmt.Errorf("read the order: %w", err)
			}
			return load(o, os.Stdin, out)
		case "serve":
			return serve(args[1], out)
		case "member":
			return member(out)
		case "hold":
			return hold(args[1], out)
		}
	}
	if missing := netlab.Missing(); len(missing) > 0 {
		return fmt.Errorf("build the lab: missing %v", missing)
	}
	show := &progress{out: os.Stderr, terminal: isTerminal(os.Stderr)}
	if len(args) > 0 && args[0] == "scale" {
		return scale(ctx, args[1:], out, show)
	}
	s, err := parse(args)
	if err != nil {
		return err
	}
	began := time.Now()
	r, err := measure(ctx, s, show)
	if err != nil {
		return err
	}
	r.Took = time.Since(began).Round(time.Second).String()
	fmt.Fprint(out, r.tables())
	if s.out == "" {
		return nil
	}
	return r.write(s.out)
}

// settings say what is measured.
type settings struct {
	binary      string
	out         string
	rounds      int
	duration    time.Duration // of one measurement
	connections []int
	opens       int   // bounds the connections of one measurement, for the sake of the ephemeral ports
	idle        []int // how many idle connections the memory is measured with
	settle      time.Duration
	watching    time.Duration // of the daemons under one load that they do not carry
	profiling   int           // seconds of each profile
}

func parse(args []string) (settings, error) {
	s := settings{connections: []int{1, 4, 32}, opens: 5000, idle: []int{0, 1000, 10000}, settle: 10 * time.Second, watching: 2 * time.Second, profiling: 5}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.StringVar(&s.binary, "nodeproxy", "build/nodeproxy", "the executable to measure")
	flags.StringVar(&s.out, "out", "", "directory for end-to-end.json, end-to-end.md and its plots; empty: none are written")
	flags.IntVar(&s.rounds, "rounds", 5, "how often every path is measured")
	flags.DurationVar(&s.duration, "duration", time.Second, "how long one measurement takes")
	smoke := flags.Bool("smoke", false, "one tiny round, to see that everything works")
	if err := flags.Parse(args); err != nil {
		return s, flag.ErrHelp // the flag set has said why
	}
	if flags.NArg() > 0 || s.rounds < 1 || s.duration <= 0 {
		return s, fmt.Errorf("read the flags: want -rounds of at least 1, a positive -duration, and no arguments, got %q", args)
	}
	if *smoke {
		s.rounds, s.duration, s.connections = 1, 50*time.Millisecond, []int{1, 4}
		s.opens, s.idle, s.settle, s.watching, s.profiling = 100, []int{0, 100}, 0, 200*time.Millisecond, 1
	}
	return s, nil
}

func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// progress tells people how far it is.
type progress struct {
	out      io.Writer
	terminal bool
}

func (p *progress) say(format string, args ...any) {
	if p.terminal {
		fmt.Fprintf(p.out, "\r\x1b[K"+format, args...)
		return
	}
	fmt.Fprintf(p.out, format+"\n", args...)
}

// step is say for what is only worth seeing while it happens.
func (p *progress) step(format string, args ...any) {
	if p.terminal {
		p.say(format, args...)
	}
}

func (p *progress) end() {
	if p.terminal {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
}
