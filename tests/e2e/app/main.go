// Command app is the application of the end-to-end tests: a server that does as the first line of a connection says, and
// a client that can open a socket in every way that matters to a redirect.
//
//	app serve [-first] [-unix] ADDRESS...   serves; -first speaks before the client does
//	app dial [flags] ADDRESS [COMMAND]      connects, sends COMMAND, prints what comes back and how it ended
//	app hold -n N ADDRESS                   opens N connections and holds them until its stdin ends
//	app repeat -n N -at-once M ADDRESS      connects N times, M at once, asks "peer", and prints how many were answered
//	app udp ADDRESS [TEXT]                  without TEXT: answers every datagram; with TEXT: sends it and prints the answer
//	app quick [-reset] [-port N]            accepts and ends each connection at once
//	app flip                                moves between network namespaces for ever
package main

import (
	"fmt"
	"os"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	roles := map[string]func([]string) error{"serve": serve, "dial": dial, "hold": hold, "repeat": repeat, "udp": udp, "quick": quick, "flip": flip}
	if len(args) > 0 && roles[args[0]] != nil {
		return roles[args[0]](args[1:])
	}
	return fmt.Errorf("run app: want serve, dial, hold, repeat, udp, quick or flip, not %q", args)
}
