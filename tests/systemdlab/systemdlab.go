// Package systemdlab boots a real systemd, as PID 1 of namespaces of its own, in a lab's cgroup: with the machine's programs on a
// root of which no change is kept, units of its own, a bus of its own, and cgroup2 alone.
//
// It ends with the lab.
package systemdlab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"

	systemd "github.com/coreos/go-systemd/v22/dbus"

	"nodeproxy.io/tests/netlab"
)

// boot makes what a container manager would (systemd.io/CONTAINER_INTERFACE), on a root that is the machine's but keeps no
// change and has no units. $1 is the lab's directory, $2 the unit to boot, $3 is run before that.
const boot = `set -e
lab=$1 unit=$2
mount --make-rprivate /
mount -t tmpfs tmpfs "$lab/overlay"
mkdir "$lab/overlay/upper" "$lab/overlay/work" "$lab/overlay/root"
root=$lab/overlay/root
mount -t overlay -o "lowerdir=/,upperdir=$lab/overlay/upper,workdir=$lab/overlay/work" overlay "$root"
mkdir -p "$root$lab"
mount --bind "$lab" "$root$lab"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/usr/lib/systemd/system"
mount -t tmpfs tmpfs "$root/etc/systemd/system"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t bpf bpf "$root/sys/fs/bpf"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,ro,bind "$root/proc/sys"
mount -t tmpfs tmpfs "$root/dev"
for node in 'null 1 3' 'zero 1 5' 'full 1 7' 'random 1 8' 'urandom 1 9' 'tty 5 0'; do
  set -- "$1" "$2" "$3" $node
  mknod -m 666 "$root/dev/$4" c "$5" "$6"
done
ln -s pts/ptmx "$root/dev/ptmx"
mkdir "$root/dev/shm"
mount -t tmpfs tmpfs "$root/dev/shm"
ln -s "$lab/console" "$root/dev/console"
cd "$root"
pivot_root . .
umount -l .
cd /
eval "$3"
exec env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_UNIT_PATH="$lab/units:" DBUS_SYSTEM_BUS_ADDRESS="unix:path=$lab/bus" \
  /lib/systemd/systemd --system --unit="$unit" --log-target=console --show-status=no
`

const busConfig = `<busconfig>
  <type>system</type>
  <listen>systemd:</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow eavesdrop="true"/>
    <allow send_destination="*" eavesdrop="true"/>
  </policy>
</busconfig>
`

// Systemd is a running service manager.
type Systemd struct {
	Units  string // the directory of its unit files
	Root   string // the directory that is the root of its cgroup hierarchy
	dir    string
	socket string
	lab    *netlab.Lab
	cgroup *netlab.Cgroup
	outer  int // the process whose only child is systemd
}

// The unit that is booted: a drop-in may make it want more.
const target = "lab.target"

// Missing names what Boot needs and this machine does not have.
func Missing() []string {
	var missing []string
	for _, path := range []string{"/lib/systemd/systemd", "dbus-daemon", "unshare", "nsenter", "pivot_root"} {
		if _, err := exec.LookPath(path); err != nil {
			missing = append(missing, path)
		}
	}
	return missing
}

// Boot starts systemd in a cgroup below the lab's and returns when it answers on its bus.
func Boot(ctx context.Context, lab *netlab.Lab) (*Systemd, error) {
	s, err := New(lab)
	if err != nil {
		return nil, err
	}
	return s, s.Boot(ctx, "")
}

// New makes a system that is not booted yet. A lab has one.
func New(lab *netlab.Lab) (*Systemd, error) {
	cgroup, err := lab.Cgroup().Child("systemd")
	if err != nil {
		return nil, err
	}
	s := &Systemd{Root: cgroup.Path(), dir: filepath.Join(lab.Dir(), "systemd"), lab: lab, cgroup: cgroup}
	s.Units, s.socket = filepath.Join(s.dir, "units"), filepath.Join(s.dir, "bus")
	return s, s.write()
}

// Boot runs a script of sh, on the root and in the namespaces that systemd will have, and then systemd.
func (s *Systemd) Boot(ctx context.Context, script string) error {
	process, err := s.lab.Start(netlab.Command{
		Path: "unshare", Args: []string{"--pid", "--fork", "--kill-child", "--mount", "--cgroup", "--uts", "--ipc", "--net", "sh", "-c", boot, "sh", s.dir, target, script},
		Cgroup: s.cgroup,
	})
	if err != nil {
		return err
	}
	s.outer = process.PID()
	for {
		err := s.ping(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-process.Done():
			return fmt.Errorf("boot systemd: it ended: %s", process.Output())
		case <-ctx.Done():
			return fmt.Errorf("boot systemd: %w: %w; its log:\n%s", context.Cause(ctx), err, s.Log())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (s *Systemd) write() error {
	files := map[string]string{
		"console": "", "bus.conf": busConfig,
		"units/" + target:   "[Unit]\nDefaultDependencies=no\nWants=dbus.socket dbus.service\n",
		"units/dbus.socket": "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=" + s.socket + "\nListenStream=/run/dbus/system_bus_socket\n",
		"units/dbus.service": "[Unit]\nDefaultDependencies=no\nRequires=dbus.socket\n[Service]\nRestart=always\nRestartSec=100ms\n" +
			"ExecStart=dbus-daemon --config-file=" + filepath.Join(s.dir, "bus.conf") + " --nofork --nopidfile --systemd-activation\n",
	}
	for _, name := range []string{"sysinit", "basic", "shutdown", "local-fs", "network-pre", "network-online", "multi-user"} {
		files["units/"+name+".target"] = "[Unit]\nDefaultDependencies=no\n"
	}
	err := errors.Join(os.MkdirAll(s.Units, 0o755), os.Mkdir(filepath.Join(s.dir, "overlay"), 0o755))
	for name, text := range files {
		err = errors.Join(err, os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o644))
	}
	return err
}

// PID is systemd's, as the lab sees it.
func (s *Systemd) PID() (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", s.outer, s.outer))
	if err != nil {
		return 0, fmt.Errorf("find systemd: %w", err)
	}
	return strconv.Atoi(strings.TrimSpace(string(text)))
}

// Inside is where a path of its root is for those who are outside.
func (s *Systemd) Inside(path string) (string, error) {
	pid, err := s.PID()
	return filepath.Join("/proc", strconv.Itoa(pid), "root", path), err
}

// Start runs a command in its namespaces: in the cgroup of a unit, or with "" in none of its.
func (s *Systemd) Start(unit string, args ...string) (*netlab.Process, error) {
	pid, err := s.PID()
	if err != nil {
		return nil, err
	}
	if unit != "" {
		args = append([]string{"sh", "-c", `echo $$ >"/sys/fs/cgroup/system.slice/$0/cgroup.procs" && exec "$@"`, unit}, args...)
	}
	return s.lab.Start(netlab.Command{
		Path: "nsenter",
		Args: append([]string{"--target", strconv.Itoa(pid), "--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup"}, args...),
		Env:  []string{"DEBIAN_FRONTEND=noninteractive", "LC_ALL=C"},
	})
}

// Run is Start, and waits for its end. It returns the output, which the error quotes.
func (s *Systemd) Run(ctx context.Context, unit string, args ...string) (string, error) {
	p, err := s.Start(unit, args...)
	if err != nil {
		return "", err
	}
	if err = p.Wait(ctx); err != nil {
		p.Kill()
	}
	return p.Output(), err
}

// Log is what systemd wrote to its console.
func (s *Systemd) Log() string {
	text, _ := os.ReadFile(filepath.Join(s.dir, "console"))
	return string(text)
}

func (s *Systemd) ping(ctx context.Context) error {
	conn, err := s.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.ListUnitsByPatternsContext(ctx, nil, []string{target})
	return err
}

// Dial connects to its bus.
func (s *Systemd) Dial(ctx context.Context) (*dbus.Conn, error) {
	return dbus.Connect("unix:path="+s.socket, dbus.WithContext(ctx), dbus.WithAuth(dbus.AuthExternal(strconv.Itoa(os.Geteuid()))),
		dbus.WithSignalHandler(dbus.NewSequentialSignalHandler()))
}

// Connect connects to it over its bus. Close the connection.
func (s *Systemd) Connect(ctx context.Context) (*systemd.Conn, error) {
	return systemd.NewConnection(func() (*dbus.Conn, error) { return s.Dial(ctx) })
}

// Do does what "systemctl VERB UNIT" does, with start, stop or restart, and waits until it is done.
func (s *Systemd) Do(ctx context.Context, verb, unit string) error {
	conn, err := s.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	do := map[string]func(context.Context, string, string, chan<- string) (int, error){
		"start": conn.StartUnitContext, "stop": conn.StopUnitContext, "restart": conn.RestartUnitContext,
	}[verb]
	done := make(chan string, 1)
	if _, err := do(ctx, unit, "replace", done); err != nil {
		return fmt.Errorf("%s %s: %w", verb, unit, err)
	}
	select {
	case result := <-done:
		if result != "done" {
			return fmt.Errorf("%s %s: %s; systemd's log:\n%s", verb, unit, result, s.Log())
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s %s: %w", verb, unit, context.Cause(ctx))
	}
}

// Reload makes it read its unit files again, as "systemctl daemon-reload" does.
func (s *Systemd) Reload(ctx context.Context) error {
	conn, err := s.Connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	return conn.ReloadContext(ctx)
}

// Unit writes a unit file, or with a name such as "web.service.d/10.conf" a drop-in, and returns its path.
func (s *Systemd) Unit(name string, lines ...string) (string, error) {
	path := filepath.Join(s.Units, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", err
	}
	return path, os.WriteFile(path, []byte(strings.Join(lines, "\n")+"\n"), 0o644)
}
