package workload

import (
	"maps"
	"os"
	"slices"
	"testing"
)

func TestAnInstanceEndsWithAllOfItsWorkloads(t *testing.T) {
	of := func(ending bool, instances ...string) *entry {
		return &entry{claim: Claim{Ending: ending}, instances: instances}
	}
	m := &Manager{workloads: map[string]*entry{
		"/one": of(true, "alone", "shared"), "/two": of(false, "shared", "stays"), "/three": of(true, "both"), "/four": of(true, "both"),
	}}
	m.noteEndings()
	if want := []string{"alone", "both"}; !slices.Equal(m.ends, want) {
		t.Errorf("%v end, want %v", m.ends, want)
	}
	if want := map[string]bool{"alone": true, "both": true, "shared": false, "stays": false}; !maps.Equal(m.served, want) {
		t.Errorf("%v are served, want %v", m.served, want)
	}
}

func TestAUnitThatIsBeingStoppedEnds(t *testing.T) {
	m := bootSystemd(t)
	m.unit("web.service", sleeper, "ExecStop=sh -c 'until [ -e /run/enough ]; do sleep 0.1; done'", "[X-NodeProxy]", "Service=web")
	m.follow()
	m.do("start", "web.service")
	m.await("system.slice/web.service=web")
	stopped := make(chan error, 1)
	go func() { stopped <- m.Do(within30(t), "restart", "web.service") }()
	m.await("system.slice/web.service=web,ending")
	enough, err := m.Inside("/run/enough")
	m.must(err)
	m.must(os.WriteFile(enough, nil, 0o600))
	m.must(<-stopped)
	m.await("system.slice/web.service=web")
}
