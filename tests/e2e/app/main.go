// Command app is the application of the end-to-end tests: a server that does as the first line of a connection says, and
// a client that can open a socket in every way that matters to a redirect.
//
//	app serve [-first] [-unix] ADDRESS...   serves; -first speaks before the client does
//	app dial [flags] ADDRESS [COMMAND]      connects, sends COMMAND, prints what comes back and how it ended
//	app echo [-half] [-n N] ADDRESS         sends N bytes to "app serve" and reads them back
//	app hold [-await] -n N [-say HEX] ADDR  opens N connections, -await: one after another is answered, and holds them until its stdin ends
//	app load [-n N] [-c C] ADDRESS          makes N connections, C at a time, and counts the failures; -n 0: until its stdin ends
//	app repeat -n N -at-once M ADDRESS      connects N times, M at once, asks "peer", and prints how many were answered
//	app udp ADDRESS [TEXT]                  without TEXT: answers every datagram; with TEXT: sends it and prints the answer
//	app resolve NAME                        prints the addresses of a name
//	app silent ADDRESS                      prints the datagrams that come, and answers none
//	app late ADDRESS                        prints the name queries that come, and answers them when its stdin ends
//	app quick [-reset] [-port N]            accepts and ends each connection at once
//	app flicker ADDRESS                     listens and stops listening in turn
//	app flip                                moves between network namespaces for ever
package main

import (
	"fmt"
	"maps"
	"os"
	"slices"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	roles := map[string]func([]string) error{
		"serve": serve, "dial": dial, "echo": echo, "hold": hold, "load": load, "repeat": repeat, "udp": udp, "resolve": resolve, "silent": silent, "late": late, "quick": quick, "flicker": flicker, "flip": flip,
	}
	if len(args) > 0 && roles[args[0]] != nil {
		return roles[args[0]](args[1:])
	}
	return fmt.Errorf("run app: want one of %q, not %q", slices.Sorted(maps.Keys(roles)), args)
}
