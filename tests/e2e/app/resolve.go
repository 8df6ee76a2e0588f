package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/miekg/dns"
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

// late is a name server by UDP and TCP: it prints "ready" for each, then "heard NAME", and answers "late" once its stdin has ended.
func late(args []string) error {
	if len(args) != 1 {
		return errors.New("late: want one address")
	}
	told := make(chan struct{})
	go func() {
		defer close(told)
		_, _ = io.Copy(io.Discard, os.Stdin)
	}()
	answer := func(w dns.ResponseWriter, query *dns.Msg) {
		fmt.Println("heard", query.Question[0].Name)
		<-told
		reply := new(dns.Msg).SetReply(query)
		reply.Answer = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: query.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET}, Txt: []string{"late"}}}
		_ = w.WriteMsg(reply)
	}
	failed := make(chan error)
	for _, network := range []string{"udp", "tcp"} {
		server := &dns.Server{Addr: args[0], Net: network, Handler: dns.HandlerFunc(answer), NotifyStartedFunc: func() { fmt.Println("ready", network) }}
		go func() { failed <- server.ListenAndServe() }()
	}
	return <-failed
}
