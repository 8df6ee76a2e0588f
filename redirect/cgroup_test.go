package redirect_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"nodeproxy.io/redirect"
	"nodeproxy.io/tests/netlab"
)

// appJoin is a daemon that looks which cgroup it is in, as it is mounted.
func appJoin() {
	before := os.Getpid()
	if err := redirect.JoinNodeCgroups(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	dir, err := redirect.ProcessCgroup(os.Getpid())
	fmt.Println(dir, err, before == os.Getpid())
}

// container runs what follows as a container's runtime does: with a cgroup namespace of its own in $1, below the node's cgroups,
// of which it sees all, in the process namespace of the node unless $2 is "alone".
const container = `set -e
umount --lazy --recursive /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir "/sys/fs/cgroup/$1"
echo $$ >"/sys/fs/cgroup/$1/cgroup.procs"
alone=
[ "$2" != alone ] || alone='--pid --fork --mount-proc'
shift 2
unshare --cgroup $alone "$@"
`

func TestAContainerSeesCgroupsAsItsNodeDoes(t *testing.T) {
	lab := netlab.ForTest(t)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for where, want := range map[string]string{"node": "/sys/fs/cgroup/pod-node <nil> true\n", "alone": ""} {
		node, err := lab.Cgroup().Child(where)
		if err != nil {
			t.Fatal(err)
		}
		out, err := lab.Run(ctx, netlab.Command{
			Path: "unshare", Args: []string{"--pid", "--fork", "--kill-child", "--mount-proc", "--cgroup", "sh", "-c", container, "sh", "pod-" + where, where, os.Args[0]},
			Cgroup: node, Env: []string{"NP_APP=join"},
		})
		if want == "" {
			if err == nil {
				t.Errorf("%s: no error, but %q", where, out)
			}
			t.Log(out)
			continue
		}
		if err != nil || out != want {
			t.Errorf("%s: %q, %v, want %q", where, out, err, want)
		}
	}
}

// appOwn is a daemon that looks for its own cgroup, in which another process is that has come after it.
func appOwn() {
	time.Sleep(50 * time.Millisecond) // the kernel counts starts in hundredths of a second
	probe := exec.Command("sleep", "600")
	if err := probe.Start(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(redirect.OwnCgroup(os.Getenv("NP_NODE"), 0))
	_ = probe.Process.Kill()
	_ = probe.Wait()
}

func TestTheCgroupInWhichADaemonIsFirstIsItsOwn(t *testing.T) {
	lab := netlab.ForTest(t)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	mount, err := redirect.CgroupMount()
	if err != nil {
		t.Fatal(err)
	}
	node := lab.Name()
	made := filepath.Join(mount, "nodeproxy-"+node)
	t.Cleanup(func() { _ = os.Remove(made) })
	for name, command := range map[string]string{"first": `exec "$0"`, "second": `"$0"; :`} {
		cgroup, err := lab.Cgroup().Child(name)
		if err != nil {
			t.Fatal(err)
		}
		out, err := lab.Run(ctx, netlab.Command{Path: "sh", Args: []string{"-c", command, os.Args[0]}, Cgroup: cgroup, Env: []string{"NP_APP=own", "NP_NODE=" + node}})
		want := cgroup.Path()
		if name == "second" {
			want = made
		}
		if err != nil || out != want+" <nil>\n" {
			t.Errorf("%s: %q, %v, want %s", name, out, err, want)
		}
	}
}
