package vm

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

const (
	planPath = "/plan.json"
	lastLine = "=== end of the run: "
	success  = "every program exited with status 0"
)

// Program is a command line.
type Program struct {
	Args []string // the first is a path inside the machine
	Env  []string // added to PATH, HOME and TMPDIR
}

func (p Program) String() string { return strings.Join(p.Args, " ") }

// Plan is what a machine is told to do. Run writes it, tests/vm/guest carries it out.
type Plan struct {
	Release  string   // of the kernel that has to be running, as uname -r prints it
	Modules  []string // files, in the order of loading
	Programs []Program
}

// ReadPlan reads the plan of the machine that this process is the first process of.
func ReadPlan() (*Plan, error) {
	text, err := os.ReadFile(planPath)
	if err != nil {
		return nil, fmt.Errorf("read plan: %w", err)
	}
	p := new(Plan)
	if err := json.Unmarshal(text, p); err != nil {
		return nil, fmt.Errorf("read plan: %w", err)
	}
	return p, nil
}

// LastLine is what the guest prints when it is done, and what Run waits for. err is nil if every program exited with
// status 0.
func LastLine(err error) string {
	if err == nil {
		return lastLine + success
	}
	return lastLine + strings.ReplaceAll(err.Error(), "\n", "; ")
}
