package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"nodeproxy.io/nodeproxy/admin"
)

// Exit statuses.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

const defaultConfig = "/etc/nodeproxy/nodeproxy.hcl"

// env is the world of a command.
type env struct {
	stdout, stderr io.Writer
	getenv         func(string) string
	terminal       bool // stdout is one
}

// style colours only what a person reads, see https://no-color.org.
func (e *env) style() style { return style(e.terminal && e.getenv("NO_COLOR") == "") }

// printf writes to stdout. That it cannot be written to, as after "| head", is no error of the command.
func (e *env) printf(format string, args ...any) { _, _ = fmt.Fprintf(e.stdout, format, args...) }

func (e *env) json(v any) error {
	enc := json.NewEncoder(e.stdout)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("write the answer: %w", err)
	}
	return nil
}

// usageError is a command line that makes no sense.
type usageError struct {
	err error
	cmd *cobra.Command
}

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// execute runs one command line and returns the exit status.
func execute(ctx context.Context, e *env, args []string) int {
	root := newRoot(e)
	root.SetArgs(args)
	root.SetOut(e.stdout)
	root.SetErr(e.stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitDone
	}
	_, _ = fmt.Fprintf(e.stderr, "nodeproxy: %s\n", cleanLines(err.Error()))
	if usage, ok := errors.AsType[*usageError](err); ok {
		_, _ = fmt.Fprintf(e.stderr, "Try \"%s -h\".\n", usage.cmd.CommandPath())
		return exitUsage
	}
	return exitFailed
}

func newRoot(e *env) *cobra.Command {
	root := &cobra.Command{
		Use:   "nodeproxy",
		Short: "Transparent, eBPF-assisted node proxy for Consul Connect",
		Long: "nodeproxy redirects the sockets of enrolled workloads to one mTLS proxy per node, which holds the certificate\n" +
			"of every local service and enforces Consul's intentions. Applications are not changed.",
		Example:                    "  nodeproxy demo                                   # see it work, nothing else needed\n  nodeproxy check --config /etc/nodeproxy           # would it work here?\n  nodeproxy run --config /etc/nodeproxy",
		Args:                       noSuchCommand,
		RunE:                       func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SilenceErrors:              true,
		SuggestionsMinimumDistance: 2,
		SilenceUsage:               true,
		CompletionOptions:          cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error { return &usageError{err, cmd} })
	root.AddCommand(
		newRun(e), newReload(e), newBoot(e), newDemo(e), newDemoApp(e), newCheck(e), newCanary(e), newStatus(e), newTrace(e), newExplain(e),
		newEnroll(e), newUnenroll(e), newCleanup(e), newCA(e), newVersion(e), newReady(), newLive(), newMan(e),
	)
	return root
}

func noSuchCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	text := fmt.Sprintf("unknown command %q", args[0])
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		text += ": did you mean " + strings.Join(near, " or ") + "?"
	}
	return &usageError{errors.New(text), cmd}
}

// exactly wants those arguments.
func exactly(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == len(names) {
			return nil
		}
		wants := "no arguments"
		if len(names) > 0 {
			wants = strings.Join(names, " ")
		}
		return &usageError{fmt.Errorf("%s takes %s", cmd.Name(), wants), cmd}
	}
}

// socketFlag adds --socket and returns the client that it leads to.
func socketFlag(cmd *cobra.Command) func() *admin.Client {
	socket := cmd.Flags().String("socket", admin.DefaultSocket, "the daemon's `PATH`, admin.socket in its configuration")
	return func() *admin.Client { return admin.NewClient(*socket) }
}

func jsonFlag(cmd *cobra.Command) *bool {
	return cmd.Flags().Bool("json", false, "print JSON")
}

func configFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("config", defaultConfig, "`PATH` of a file, or a directory of files, in HCL or JSON")
}
