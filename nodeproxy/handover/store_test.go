package handover_test

import (
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"nodeproxy.io/nodeproxy/handover"
)

func TestAServiceManagerThatHangsHoldsUpOneCallAlone(t *testing.T) {
	dir := t.TempDir()
	at := filepath.Join(dir, "notify")
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: at, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	t.Setenv("NOTIFY_SOCKET", at)
	store, err := handover.FindStore()
	if err != nil {
		t.Fatal(err)
	}
	hangs := false
	for range 1000 { // more than its queue takes
		state, _ := json.Marshal(time.Now())
		f, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		began := time.Now()
		err = store.Keep(handover.Self{}, state, map[string]syscall.Conn{"listener": f})
		took := time.Since(began)
		if hangs {
			if !errors.Is(err, os.ErrDeadlineExceeded) || took > time.Second {
				t.Errorf("the second call takes %v: %v", took, err)
			}
			return
		}
		hangs = errors.Is(err, os.ErrDeadlineExceeded)
	}
	t.Error("the queue of messages is endless")
}
