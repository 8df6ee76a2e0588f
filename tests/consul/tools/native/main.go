// Command native is a Connect peer made with Consul's own library, for tests.
//
//	native serve SERVICE ADDRESS                  answers "accept=SERVICE" to every connection that it authorises
//	native serve SERVICE ADDRESS TARGET           passes each on to TARGET, in plaintext
//	native dial SERVICE DESTINATION               connects to an instance of DESTINATION as SERVICE and prints what comes back
//	native forward SERVICE DESTINATION LISTEN     passes connections to LISTEN on to DESTINATION, as SERVICE
//	native health ADDRESS                         answers gRPC health checks, in plaintext
//
// The agent is that of CONSUL_HTTP_ADDR.
package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/consul/connect"
	"google.golang.org/grpc"
	grpchealth "google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

const patience = 30 * time.Second

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	wanted := map[string][]int{"serve": {3, 4}, "dial": {3}, "forward": {4}, "health": {2}}
	if len(args) == 0 || !slices.Contains(wanted[args[0]], len(args)) {
		return fmt.Errorf("run native: want serve SERVICE ADDRESS [TARGET], dial SERVICE DESTINATION, forward SERVICE DESTINATION LISTEN or health ADDRESS, not %q", args)
	}
	if args[0] == "health" {
		return health(args[1])
	}
	client, err := api.NewClient(api.DefaultConfig())
	if err != nil {
		return err
	}
	service, err := connect.NewService(args[1], client)
	if err != nil {
		return err
	}
	defer service.Close()
	select {
	case <-service.ReadyWait():
	case <-time.After(patience):
		return fmt.Errorf("%s has no certificate within %s", args[1], patience)
	}
	switch args[0] {
	case "serve":
		answer := func(conn *tls.Conn) error { return greet(conn, args[1]) }
		if len(args) == 4 {
			answer = func(conn *tls.Conn) error { return deliver(conn, args[3]) }
		}
		return serve(service, args[2], answer)
	case "dial":
		return dial(service, client, args[2])
	default:
		return forward(service, client, args[2], args[3])
	}
}

func health(address string) error {
	ln, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	healthpb.RegisterHealthServer(server, grpchealth.NewServer())
	fmt.Println("ready")
	return server.Serve(ln)
}

// accept calls handle for every connection to address.
func accept(address string, handle func(net.Conn)) error {
	ln, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		conn, err := ln.Accept()
		if err != nil {
			return err
		}
		go handle(conn)
	}
}

func serve(service *connect.Service, address string, answer func(*tls.Conn) error) error {
	return accept(address, func(conn net.Conn) {
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(patience))
		secure := tls.Server(conn, service.ServerTLSConfig())
		if err := secure.Handshake(); err != nil {
			fmt.Println("refused:", err)
			return
		}
		if err := answer(secure); err != nil {
			fmt.Println("ended:", err)
		}
	})
}

func greet(conn *tls.Conn, name string) error {
	if _, err := fmt.Fprintf(conn, "accept=%s\n", name); err != nil {
		return err
	}
	_ = conn.CloseWrite()
	_, err := io.Copy(io.Discard, conn)
	return err
}

func deliver(conn *tls.Conn, target string) error {
	to, err := net.Dial("tcp", target)
	if err != nil {
		return err
	}
	splice(conn, to)
	return nil
}

func forward(service *connect.Service, client *api.Client, destination, listen string) error {
	return accept(listen, func(conn net.Conn) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		to, err := service.Dial(ctx, &connect.ConsulResolver{Client: client, Name: destination})
		if err != nil {
			fmt.Println("refused:", err)
			conn.Close()
			return
		}
		splice(conn, to)
	})
}

// splice copies both ways until either way ends, and closes both.
func splice(a, b net.Conn) {
	var copying sync.WaitGroup
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		copying.Go(func() {
			_, _ = io.Copy(way[0], way[1])
			a.Close()
			b.Close()
		})
	}
	copying.Wait()
}

func dial(service *connect.Service, client *api.Client, destination string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := service.Dial(ctx, &connect.ConsulResolver{Client: client, Name: destination})
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, "peer\n"); err != nil {
		return err
	}
	buf := make([]byte, 1024)
	n, err := conn.Read(buf)
	fmt.Printf("%s\n", buf[:n])
	return err
}
