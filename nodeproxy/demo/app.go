package demo

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// AppCommand is the subcommand of the executable that runs App. It is hidden: it exists for Run.
const AppCommand = "demo-app"

const (
	secret        = "the recipe of the house: nobody on the wire may read this line"
	chunkInterval = 10 * time.Millisecond
	clientTimeout = 10 * time.Second
)

// App is the application that the demonstration protects: an ordinary HTTP server and client that know of no proxy.
//
//	serve ADDRESS   answers / with the caller's address and a secret, and /stream with the secret, for ever
//	get URL         prints the answer
//	stream URL      prints "receiving" once bytes arrive, and the time in ns and the error when they stop
func App(ctx context.Context, args []string, out io.Writer) error {
	if len(args) != 2 {
		return errors.New("run the demonstration's application: want serve ADDRESS, get URL or stream URL")
	}
	switch args[0] {
	case "serve":
		return serve(ctx, args[1], out)
	case "get":
		return get(ctx, args[1], out)
	case "stream":
		return stream(ctx, args[1], out)
	}
	return fmt.Errorf("run the demonstration's application: unknown role %q", args[0])
}

func serve(ctx context.Context, address string, out io.Writer) error {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		caller, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintf(w, "caller=%s\n%s\n", caller, secret)
	})
	mux.HandleFunc("/stream", streamSecret)
	ln, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: mux, ReadHeaderTimeout: clientTimeout}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	fmt.Fprintln(out, "listening")
	return server.Serve(ln)
}

func streamSecret(w http.ResponseWriter, r *http.Request) {
	tick := time.NewTicker(chunkInterval)
	defer tick.Stop()
	line := strings.Repeat(secret+"\n", 16)
	for {
		select {
		case <-tick.C:
		case <-r.Context().Done():
			return
		}
		if _, err := io.WriteString(w, line); err != nil {
			return
		}
		if err := http.NewResponseController(w).Flush(); err != nil {
			return
		}
	}
}

func open(ctx context.Context, url string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	return http.DefaultClient.Do(req)
}

func get(ctx context.Context, url string, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, clientTimeout)
	defer cancel()
	resp, err := open(ctx, url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(out, resp.Body)
	return err
}

func stream(ctx context.Context, url string, out io.Writer) error {
	resp, err := open(ctx, url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body := bufio.NewReader(resp.Body)
	if _, err := body.ReadString('\n'); err != nil {
		return err
	}
	fmt.Fprintln(out, "receiving")
	n, err := io.Copy(io.Discard, body)
	fmt.Fprintf(out, "stopped=%d after=%d error=%v\n", time.Now().UnixNano(), n, err)
	return nil
}
