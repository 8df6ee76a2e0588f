package workload

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/coreos/go-systemd/v22/unit"
	"golang.org/x/sys/unix"
)

const (
	unitSection = "X-NodeProxy" // systemd ignores sections whose names begin with X- (systemd.unit(5))
	maxUnitFile = 1 << 20
)

// unitKeys are the keys of labels as unit files spell them.
var unitKeys = map[string]string{
	"Mesh": "mesh", "Service": "service", "Ports": "ports", "Mode": "mode", "SameNode": "same-node",
	"ExcludeInboundPorts": "exclude-inbound-ports", "ExcludeOutboundPorts": "exclude-outbound-ports",
	"ExcludeOutboundCIDRs": "exclude-outbound-cidrs", "DNS": "dns", "L7": "l7",
}

// unitLabels reads the section of a unit from its files, the unit's own and then its drop-ins in systemd's order: the last
// setting of a key holds, an empty one takes it back. Without such a section it returns nil. Files that are not root's alone
// to write are refused: a label grants an identity.
func unitLabels(files []string) (Labels, error) {
	var labels Labels
	for _, path := range files {
		options, err := unitOptions(path)
		if err != nil {
			return nil, err
		}
		for _, o := range options {
			if labels == nil {
				labels = make(Labels)
			}
			key, known := unitKeys[o.Name]
			value := strings.TrimSpace(strings.ReplaceAll(o.Value, "\\\n", " ")) // a line that is continued
			switch {
			case !known:
				return nil, fmt.Errorf("unit file %s has an unknown key %s in section %s: the keys are %s", path, o.Name, unitSection,
					strings.Join(slices.Sorted(maps.Keys(unitKeys)), " "))
			case value == "":
				delete(labels, key)
			default:
				labels[key] = value
			}
		}
	}
	if len(labels) == 0 {
		return nil, nil
	}
	return labels, nil
}

// unitOptions returns what a unit file has in our section.
func unitOptions(path string) ([]*unit.UnitOption, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read a unit's section %s: %w", unitSection, err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("look at unit file %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, nil // masked: /dev/null
	}
	text, err := io.ReadAll(io.LimitReader(f, maxUnitFile))
	if err != nil {
		return nil, fmt.Errorf("read unit file %s: %w", path, err)
	}
	if !bytes.Contains(text, []byte("["+unitSection+"]")) {
		return nil, nil
	}
	if st.Uid != 0 || st.Mode&0o022 != 0 {
		return nil, fmt.Errorf("unit file %s has mode %04o and belongs to user %d: it must be root's and writable by nobody else, because its section %s grants an identity",
			path, st.Mode&0o7777, st.Uid, unitSection)
	}
	options, err := unit.DeserializeOptions(bytes.NewReader(text))
	if err != nil {
		return nil, fmt.Errorf("parse unit file %s: %w", path, err)
	}
	var ours []*unit.UnitOption
	for _, o := range options {
		if o.Section == unitSection {
			ours = append(ours, o)
		}
	}
	return ours, nil
}
