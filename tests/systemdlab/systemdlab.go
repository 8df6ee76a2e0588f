// Package systemdlab boots a real systemd, as PID 1 of namespaces of its own, in a lab's cgroup: with the machine's programs,
// units of its own, a bus of its own, and nothing that it could change outside.
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

// boot makes what a container manager would (systemd.io/CONTAINER_INTERFACE). $1 is the lab's directory.
const boot = `set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mount -t sysfs -o ro sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount --bind /proc/sys /proc/sys
mount -o remount,ro,bind /proc/sys
mount -t tmpfs tmpfs /dev
for node in 'null 3' 'zero 5' 'full 7' 'random 8' 'urandom 9'; do
  set -- "$1" $node
  mknod -m 666 "/dev/$2" c 1 "$3"
done
mkdir /dev/shm
mount -t tmpfs tmpfs /dev/shm
ln -s "$1/console" /dev/console
exec env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_UNIT_PATH="$1/units" DBUS_SYSTEM_BUS_ADDRESS="unix:path=$1/bus" \
  /lib/systemd/systemd --system --unit=lab.target --log-target=console --show-status=no
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
}

// Missing names what Boot needs and this machine does not have.
func Missing() []string {
	var missing []string
	for _, path := range []string{"/lib/systemd/systemd", "dbus-daemon", "unshare"} {
		if _, err := exec.LookPath(path); err != nil {
			missing = append(missing, path)
		}
	}
	return missing
}

// Boot starts systemd in a cgroup below the lab's and returns when it answers on its bus.
func Boot(ctx context.Context, lab *netlab.Lab) (*Systemd, error) {
	cgroup, err := lab.Cgroup().Child("systemd")
	if err != nil {
		return nil, err
	}
	s := &Systemd{Root: cgroup.Path(), dir: filepath.Join(lab.Dir(), "systemd")}
	s.Units, s.socket = filepath.Join(s.dir, "units"), filepath.Join(s.dir, "bus")
	if err := s.write(); err != nil {
		return nil, err
	}
	process, err := lab.Start(netlab.Command{
		Path: "unshare", Args: []string{"--pid", "--fork", "--kill-child", "--mount", "--cgroup", "--uts", "--ipc", "--net", "sh", "-c", boot, "sh", s.dir},
		Cgroup: cgroup,
	})
	if err != nil {
		return nil, err
	}
	for {
		err := s.ping(ctx)
		if err == nil {
			return s, nil
		}
		select {
		case <-process.Done():
			return nil, fmt.Errorf("boot systemd: it ended: %s", process.Output())
		case <-ctx.Done():
			return nil, fmt.Errorf("boot systemd: %w: %w; its log:\n%s", context.Cause(ctx), err, s.Log())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (s *Systemd) write() error {
	files := map[string]string{
		"console": "", "bus.conf": busConfig,
		"units/lab.target":  "[Unit]\nDefaultDependencies=no\nWants=dbus.socket dbus.service\n",
		"units/dbus.socket": "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=" + s.socket + "\n",
		"units/dbus.service": "[Unit]\nDefaultDependencies=no\nRequires=dbus.socket\n[Service]\nRestart=always\nRestartSec=100ms\n" +
			"ExecStart=dbus-daemon --config-file=" + filepath.Join(s.dir, "bus.conf") + " --nofork --nopidfile --systemd-activation\n",
	}
	for _, target := range []string{"sysinit", "basic", "shutdown"} {
		files["units/"+target+".target"] = "[Unit]\nDefaultDependencies=no\n"
	}
	err := os.MkdirAll(s.Units, 0o755)
	for name, text := range files {
		err = errors.Join(err, os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o644))
	}
	return err
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
	_, err = conn.ListUnitsByPatternsContext(ctx, nil, []string{"lab.target"})
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
