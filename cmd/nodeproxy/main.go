// Command nodeproxy is the daemon, and the operator's window into it. It only wires packages together and prints.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/term"

	"nodeproxy.io/nodeproxy/cni"
)

// Set by the linker.
var (
	version = "dev"
	commit  = "unknown"
)

func main() {
	if cni.Called(os.Args, os.Getenv) {
		os.Exit(runPlugin())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // the first signal asks for an orderly end, a second one ends the process at once
	os.Exit(execute(ctx, &env{
		stdout:   os.Stdout,
		stderr:   os.Stderr,
		getenv:   os.Getenv,
		terminal: term.IsTerminal(int(os.Stdout.Fd())),
	}, os.Args[1:]))
}
