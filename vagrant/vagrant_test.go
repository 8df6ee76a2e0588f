package vagrant_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"nodeproxy.io/tests/netlab"
)

func TestTheVagrantfileIsValid(t *testing.T) {
	if _, err := exec.LookPath("vagrant"); err != nil {
		netlab.Lacks(t, "vagrant (apt-get install vagrant)")
	}
	cmd := exec.CommandContext(t.Context(), "vagrant", "validate", "--ignore-provider")
	cmd.Env = append(os.Environ(), "VAGRANT_HOME="+t.TempDir(), "VAGRANT_DOTFILE_PATH="+t.TempDir())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("vagrant validate: %v\n%s", err, out)
	}
}

func TestTheScriptsAreValidBash(t *testing.T) {
	scripts, err := filepath.Glob("*.sh")
	if err != nil || len(scripts) == 0 {
		t.Fatal("no scripts found")
	}
	for _, script := range scripts {
		if out, err := exec.CommandContext(t.Context(), "bash", "-n", script).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", script, err, out)
		}
	}
}

// TestProvisioningTwoNodesMakesAMeshInWhichTheClaimsHold runs the machines' own scripts on two nodes made of network
// namespaces.
func TestProvisioningTwoNodesMakesAMeshInWhichTheClaimsHold(t *testing.T) {
	if testing.Short() {
		t.Skip("slow: builds nodeproxy and runs the claims")
	}
	netlab.Require(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	lab, err := netlab.NewTwoNodes()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if leaks := lab.Leaks(); len(leaks) > 0 {
			t.Errorf("after close there remain: %s", strings.Join(leaks, ", "))
		}
	})
	bpffs, err := lab.BPFFS()
	if err != nil {
		t.Fatal(err)
	}
	for i, node := range lab.Nodes {
		run(ctx, t, lab, node, "provision.sh", environment(lab, node, lab.Nodes[1-i], bpffs))
	}
	out := run(ctx, t, lab, lab.Nodes[0], "claims.sh", environment(lab, lab.Nodes[0], lab.Nodes[1], bpffs))
	if strings.Contains(out, "✗") || strings.Count(out, "✓") != 10 {
		t.Errorf("not all ten claims hold:\n%s", out)
	}
}

func environment(lab *netlab.TwoNodes, node, peer *netlab.Node, bpffs string) []string {
	within := func(name string) string { return filepath.Join(node.Dir, name) }
	return []string{
		"INIT=none", "NODE=" + node.Name, "ADDRESS=" + node.IPv4.String(), "PEER_ADDRESS=" + peer.IPv4.String(), "WIRE=" + netlab.Wire,
		"PREFIX=" + within("usr"), "ETC=" + within("etc"), "RUN=" + within("run"), "STATE=" + within("state"),
		"PINS=" + filepath.Join(bpffs, "nodeproxy"), "CGROUP=" + node.Cgroup.Path(), "MESH=" + filepath.Join(lab.Dir(), "mesh.d"),
	}
}

// run runs a script on a node. What it leaves running in the background dies with the lab's cgroup.
func run(ctx context.Context, t *testing.T, lab *netlab.TwoNodes, node *netlab.Node, script string, env []string) string {
	t.Helper()
	p, err := lab.Start(netlab.Command{Path: "./" + script, Env: env, Namespace: node.Namespace})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(ctx); err != nil {
		logs, _ := filepath.Glob(filepath.Join(node.Dir, "state", "*.log"))
		for _, log := range logs {
			text, _ := os.ReadFile(log)
			t.Logf("%s:\n%s", log, text)
		}
		t.Fatalf("%s on %s: %v", script, node.Name, err)
	}
	return p.Output()
}
