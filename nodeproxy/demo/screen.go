package demo

import (
	"fmt"
	"io"
	"strings"
)

// screen writes for people, and counts the claims.
type screen struct {
	out         io.Writer
	color       bool
	interrupted func() error // not nil: what is asserted now says nothing about the mesh
	steps       int
	claims      int
	failed      int
}

func (s *screen) say(format string, args ...any) { fmt.Fprintf(s.out, format+"\n", args...) }

func (s *screen) step(title string) {
	s.steps++
	s.say("\n%s", s.paint("1", fmt.Sprintf("%d. %s", s.steps, title)))
}

// claim prints one claim with its outcome.
func (s *screen) claim(holds bool, format string, args ...any) {
	if s.interrupted() != nil {
		return
	}
	s.claims++
	mark := s.paint("32", "✓")
	if !holds {
		s.failed++
		mark = s.paint("31", "✗")
	}
	s.say("  %s %s", mark, fmt.Sprintf(format, args...))
}

// detail prints what is worth knowing about the claim above it.
func (s *screen) detail(format string, args ...any) {
	if s.interrupted() != nil {
		return
	}
	text := strings.TrimSpace(fmt.Sprintf(format, args...))
	s.say("    %s", s.paint("2", strings.ReplaceAll(text, "\n", "\n    ")))
}

func (s *screen) paint(code, text string) string {
	if !s.color {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}
