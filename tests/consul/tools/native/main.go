// Command native is a Connect peer made with Consul's own library, for tests.
//
//	native serve SERVICE ADDRESS        answers "hello from SERVICE" to every connection that it authorises
//	native dial SERVICE DESTINATION     connects to an instance of DESTINATION as SERVICE and prints what comes back
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
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/hashicorp/consul/connect"
)

const patience = 30 * time.Second

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 3 {
		return fmt.Errorf("run native: want serve SERVICE ADDRESS or dial SERVICE DESTINATION, not %q", args)
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
	if args[0] == "serve" {
		return serve(service, args[1], args[2])
	}
	return dial(service, client, args[2])
}

func serve(service *connect.Service, name, address string) error {
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
		go func() {
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(patience))
			secure := tls.Server(conn, service.ServerTLSConfig())
			if err := secure.Handshake(); err != nil {
				fmt.Println("refused:", err)
				return
			}
			fmt.Fprintf(secure, "accept=%s\n", name)
			_ = secure.CloseWrite()
			_, _ = io.Copy(io.Discard, secure)
		}()
	}
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
