package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"

	"nodeproxy.io/tests/netlab"
)

// client is a load process inside the lab, its connections open.
type client struct {
	process *netlab.Process
	in      *os.File
	out     *os.File
	answers *bufio.Reader
	stop    func() bool
}

// startClient starts a load process in the client's workload of p and waits until its connections are open. When ctx ends
// it is killed.
func (l *lab) startClient(ctx context.Context, p *path, o order) (*client, error) {
	o.To = p.to
	text, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	c := &client{}
	if err := c.start(p.client, netlab.Command{Path: l.self, Args: []string{"load", string(text)}}); err != nil {
		return nil, err
	}
	c.stop = context.AfterFunc(ctx, c.process.Kill)
	if _, err := c.answers.ReadString('\n'); err != nil {
		return nil, c.failed(ctx, err)
	}
	return c, nil
}

// start starts the command with pipes as its input and output. Only the process itself holds the other ends: when it ends,
// so does what is read from it.
func (c *client) start(w *netlab.Workload, command netlab.Command) error {
	theirIn, in, err := os.Pipe()
	if err != nil {
		return err
	}
	defer theirIn.Close()
	out, theirOut, err := os.Pipe()
	if err != nil {
		in.Close()
		return err
	}
	defer theirOut.Close()
	command.Stdin, command.Stdout = theirIn, theirOut
	if c.process, err = w.Start(command); err != nil {
		in.Close()
		out.Close()
		return err
	}
	c.in, c.out, c.answers = in, out, bufio.NewReader(out)
	return nil
}

// work lets the client do its work, and returns what it found. Its connections stay open.
func (c *client) work(ctx context.Context) (outcome, error) {
	var o outcome
	_, err := io.WriteString(c.in, "go\n")
	var line []byte
	if err == nil {
		line, err = c.answers.ReadBytes('\n')
	}
	if err == nil {
		err = json.Unmarshal(line, &o)
	}
	if err != nil {
		return o, c.failed(ctx, err)
	}
	return o, nil
}

// end closes the client's connections and waits for it.
func (c *client) end(ctx context.Context) error {
	c.in.Close()
	err := c.process.Wait(ctx)
	c.out.Close()
	c.stop()
	return err
}

// failed ends a client that did not answer and says why.
func (c *client) failed(ctx context.Context, err error) error {
	if ended := c.end(ctx); ended != nil {
		return fmt.Errorf("run a load: %w", ended)
	}
	return fmt.Errorf("run a load: %w", err)
}

// timeout bounds one measurement, from the start of the client to its end: idle connections take their time to open.
func timeout(o order) time.Duration {
	return o.Duration + 3*patience + time.Duration(o.Connections)*20*time.Millisecond
}
