package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"
)

// resolve prints "address IP" for each address of a name, as Go's own resolver has them, or "error TEXT".
func resolve(args []string) error {
	if len(args) != 1 {
		return errors.New("resolve: want one name")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	addrs, err := (&net.Resolver{PreferGo: true}).LookupNetIP(ctx, "ip", args[0])
	if err != nil {
		fmt.Println("error", err)
	}
	for _, addr := range addrs {
		fmt.Println("address", addr.Unmap())
	}
	return nil
}

// silent prints "heard" and each datagram that comes to an address, and answers none, until it is killed.
func silent(args []string) error {
	if len(args) != 1 {
		return errors.New("silent: want one address")
	}
	conn, err := net.ListenPacket("udp4", args[0])
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for b := make([]byte, 1500); ; {
		n, from, err := conn.ReadFrom(b)
		if err != nil {
			return err
		}
		fmt.Printf("heard %q from %s\n", b[:n], from)
	}
}
