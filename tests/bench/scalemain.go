package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"
)

// scale is the command "scale".
func scale(ctx context.Context, args []string, out io.Writer, p *progress) error {
	s, dir, err := parseScale(args)
	if err != nil {
		return err
	}
	where, err := thisMachine()
	if err != nil {
		return err
	}
	version, err := exec.CommandContext(ctx, s.binary, "version").Output()
	if err != nil {
		return fmt.Errorf("ask for nodeproxy's version: %w", err)
	}
	where.Nodeproxy = strings.Fields(string(version))[1]
	began := time.Now()
	all, err := measureScale(ctx, s, p)
	if err != nil {
		return err
	}
	r := newScaleReport(s, where, all)
	r.Took = time.Since(began).Round(time.Second).String()
	fmt.Fprint(out, r.tables())
	if dir == "" {
		return nil
	}
	return r.write(dir)
}

func parseScale(args []string) (s scaling, dir string, err error) {
	s = scaling{full: fullSize(), factors: []float64{0.1, 0.2, 0.5, 1}, changes: 7, settle: 10 * time.Second, idle: 5 * time.Second}
	flags := flag.NewFlagSet("bench scale", flag.ContinueOnError)
	flags.StringVar(&s.binary, "nodeproxy", "build/nodeproxy", "the executable to measure")
	flags.StringVar(&dir, "out", "", "directory for scale.json, scale.md and scale.svg; empty: none are written")
	smoke := flags.Bool("smoke", false, "tiny sizes, to see that everything works")
	if err := flags.Parse(args); err != nil {
		return s, dir, flag.ErrHelp // the flag set has said why
	}
	if flags.NArg() > 0 {
		return s, dir, fmt.Errorf("read the flags: want no arguments, got %q", args)
	}
	if *smoke {
		s.full, s.factors = size{Workloads: 8, Services: 20, Endpoints: 80, Intentions: 40}, []float64{0.5, 1}
		s.changes, s.settle, s.idle = 2, 0, 100*time.Millisecond
	}
	return s, dir, nil
}
