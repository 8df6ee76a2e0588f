package tunnel

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math"
	"net/netip"
	"testing"
	"time"
)

// The bytes are those of docs/tunnel.md.
func TestFramesAreAsDocumented(t *testing.T) {
	b := make([]byte, HeaderSize+OpeningSize)
	Header{Type: Open, Length: OpeningSize + 3, Stream: 7}.Put(b)
	Opening{ID: ID{0xaa, 15: 0xbb}, Source: netip.MustParseAddrPort("10.1.0.2:40000")}.Put(b[HeaderSize:])
	want := "0100002500000007" + "aa0000000000000000000000000000bb" + "00000000000000000000ffff0a010002" + "9c40"
	if got := hex.EncodeToString(b); got != want {
		t.Fatalf("%s\nwant %s", got, want)
	}
	h, err := ParseHeader(b)
	if err != nil || h != (Header{Open, OpeningSize + 3, 7}) {
		t.Errorf("%+v, %v", h, err)
	}
	if o := ParseOpening(b[HeaderSize:]); o.ID != (ID{0xaa, 15: 0xbb}) || o.Source.String() != "10.1.0.2:40000" {
		t.Errorf("%+v", o)
	}
}

func TestMalformedHeadersAreErrors(t *testing.T) {
	for name, text := range map[string]string{
		"type 0":                 "0000000000000001",
		"type 11":                "0b00000000000001",
		"a second byte":          "0601000000000001",
		"OPEN too short":         "0100002100000001",
		"OPEN too long":          "0100fe0100000001",
		"DATA without data":      "0500000000000001",
		"DATA too long":          "0500fe0100000001",
		"END with a body":        "0600000100000001",
		"ACCEPTED with a body":   "0200000100000001",
		"RESET with a body":      "0700000100000001",
		"DUPLICATE with a body":  "0400000100000001",
		"REFUSED without reason": "0300000000000001",
		"REFUSED with too much":  "0300004100000001",
		"PING of the wrong size": "0800000700000001",
		"PONG of the wrong size": "0900000900000001",
		"ENDING with a body":     "0a00000100000001",
	} {
		b, err := hex.DecodeString(text)
		if err != nil {
			t.Fatal(err)
		}
		if h, err := ParseHeader(b); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %+v, %v", name, h, err)
		}
	}
	if _, err := ParseReason([]byte("a\nb")); !errors.Is(err, ErrMalformed) {
		t.Errorf("a reason of two lines: %v", err)
	}
}

func FuzzParseHeader(f *testing.F) {
	f.Add([]byte{1, 0, 0, 34, 0, 0, 0, 1})
	f.Add([]byte{5, 0, 255, 255, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < HeaderSize {
			return
		}
		h, err := ParseHeader(b)
		if err != nil {
			return
		}
		if h.Length > MaxBody {
			t.Fatalf("%+v", h)
		}
		again := make([]byte, HeaderSize)
		if h.Put(again); !bytes.Equal(again, b[:HeaderSize]) {
			t.Fatalf("%x is read as %+v, which is %x", b[:HeaderSize], h, again)
		}
	})
}

func FuzzParseOpening(f *testing.F) {
	f.Add(make([]byte, OpeningSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < OpeningSize {
			return
		}
		o := ParseOpening(b)
		again := make([]byte, OpeningSize)
		if o.Put(again); !bytes.Equal(again, b[:OpeningSize]) {
			t.Fatalf("%x is read as %+v, which is %x", b[:OpeningSize], o, again)
		}
	})
}

// step is a frame that one end sends: the other must take it.
type step struct {
	from  *Session
	to    *Session
	frame Type
}

func (s step) do(t *testing.T) {
	t.Helper()
	h := Header{Type: s.frame, Stream: s.from.Send(s.frame)}
	if err := s.to.Receive(h); err != nil {
		t.Fatalf("%s: %v", s.frame, err)
	}
}

func TestStreamsFollowOneAnother(t *testing.T) {
	c, s := NewSession(false), NewSession(true)
	steps := []step{
		{c, s, Ping}, {s, c, Pong},
		{c, s, Open}, {s, c, Accepted}, {c, s, Data}, {s, c, Data}, {c, s, End}, {s, c, Data}, {s, c, End},
		{c, s, Open}, {s, c, Refused},
		{c, s, Open}, {s, c, Duplicate},
		{c, s, Open}, {s, c, Accepted}, {s, c, End}, {c, s, Data}, {c, s, End},
		{c, s, Ping}, {s, c, Pong},
	}
	for i, st := range steps {
		st.do(t)
		if i >= 1 && st.frame == End && c.Idle() != s.Idle() {
			t.Fatalf("after step %d the ends do not agree", i)
		}
	}
	if !c.Idle() || !s.Idle() || c.stream != 4 || s.stream != 4 {
		t.Errorf("%+v and %+v", c, s)
	}
}

// TestOnlyWhatIsInTurnIsTaken tries every frame in every state that an end can be in.
func TestOnlyWhatIsInTurnIsTaken(t *testing.T) {
	states := map[string]struct {
		server bool
		path   string // s: sent, r: received
		takes  map[Type]uint32
	}{
		"new server":         {true, "", map[Type]uint32{Open: 1, Ping: 0}},
		"new client":         {false, "", map[Type]uint32{Ending: 0}},
		"client, pinging":    {false, "sPING", map[Type]uint32{Pong: 0, Ending: 0}},
		"client, opening":    {false, "sOPEN", map[Type]uint32{Accepted: 1, Refused: 1, Duplicate: 1, Reset: 1, Ending: 0}},
		"server, opening":    {true, "rOPEN", map[Type]uint32{Reset: 1}},
		"client, open":       {false, "sOPEN rACCEPTED", map[Type]uint32{Data: 1, End: 1, Reset: 1}},
		"server, open":       {true, "rOPEN sACCEPTED", map[Type]uint32{Data: 1, End: 1, Reset: 1}},
		"server, peer ended": {true, "rOPEN sACCEPTED rEND", map[Type]uint32{Reset: 1}},
		"server, we ended":   {true, "rOPEN sACCEPTED sEND", map[Type]uint32{Data: 1, End: 1, Reset: 1}},
		"server, both ended": {true, "rOPEN sACCEPTED sEND rEND", map[Type]uint32{Open: 2, Ping: 1}},
		"client, both ended": {false, "sOPEN rACCEPTED rEND sEND", map[Type]uint32{Ending: 0}},
		"server, refused":    {true, "rOPEN sREFUSED", map[Type]uint32{Open: 2, Ping: 1}},
		"server, reset":      {true, "rOPEN sACCEPTED rRESET", nil},
	}
	for name, st := range states {
		for frame := Open; frame <= Ending; frame++ {
			for stream := range uint32(4) {
				s := NewSession(st.server)
				for _, word := range bytes.Fields([]byte(st.path)) {
					walk(t, s, string(word))
				}
				err := s.Receive(Header{Type: frame, Stream: stream})
				want, ok := st.takes[frame]
				if ok = ok && (want == stream || frame == Ending); ok != (err == nil) {
					t.Errorf("%s, %s of stream %d: %v", name, frame, stream, err)
				}
				if err != nil && (!errors.Is(err, ErrMalformed) || s.Idle()) {
					t.Errorf("%s, %s of stream %d: %v, idle %v", name, frame, stream, err, s.Idle())
				}
			}
		}
	}
}

func walk(t *testing.T, s *Session, word string) {
	t.Helper()
	for frame := Open; frame <= Pong; frame++ {
		if frame.String() != word[1:] {
			continue
		}
		if word[0] == 's' {
			s.Send(frame)
			return
		}
		stream := s.stream
		if frame == Open {
			stream++
		}
		if err := s.Receive(Header{Type: frame, Stream: stream}); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatalf("no frame %s", word)
}

func TestStreamNumbersDoNotWrap(t *testing.T) {
	s := NewSession(true)
	s.stream = math.MaxUint32
	if !s.Exhausted() {
		t.Error("it is not exhausted")
	}
	if err := s.Receive(Header{Type: Open, Stream: 0}); !errors.Is(err, ErrMalformed) {
		t.Errorf("got %v", err)
	}
}

// FuzzSession lets a peer send anything in any order: an end is idle, or refuses.
func FuzzSession(f *testing.F) {
	f.Add([]byte{1, 5, 6})
	f.Fuzz(func(t *testing.T, frames []byte) {
		s := NewSession(true)
		for _, b := range frames {
			h := Header{Type: Type(b & 15), Stream: s.stream + uint32(b>>7)}
			phaseBefore := s.phase
			err := s.Receive(h)
			if err != nil && s.phase != dead || phaseBefore == dead && err == nil {
				t.Fatalf("%+v in phase %d: %v, then phase %d", h, phaseBefore, err, s.phase)
			}
			if s.phase == opening && b&16 != 0 {
				s.Send(Accepted)
			}
		}
	})
}

func TestIDsAreRememberedForAMinutePerSource(t *testing.T) {
	m := NewMemory[string]()
	now := time.Now()
	m.now = func() time.Time { return now }
	if !m.Add("web", ID{1}) || m.Add("web", ID{1}) {
		t.Fatal("an id is not remembered")
	}
	if !m.Add("batch", ID{1}) {
		t.Error("an id of one source is taken for another's")
	}
	m.Remove("web", ID{1})
	if !m.Add("web", ID{1}) {
		t.Error("a removed id is remembered")
	}
	for range 6 { // ids come all the time
		now = now.Add(10 * time.Second)
		if m.Add("web", ID{1}) {
			t.Fatal("an id was forgotten within a minute")
		}
		m.Add("web", ID{2, byte(now.Second())})
	}
	now = now.Add(2 * time.Minute)
	if !m.Add("web", ID{1}) {
		t.Error("an id is remembered for ever")
	}
	now = now.Add(2 * time.Minute)
	if m.Sweep(); len(m.sources) != 0 {
		t.Errorf("%d sources are remembered for ever", len(m.sources))
	}
}

func TestTheMemoryIsBounded(t *testing.T) {
	m := NewMemory[int]()
	for i := range 3 * rememberIDs {
		m.Add(1, ID{byte(i), byte(i >> 8), byte(i >> 16)})
	}
	if s := m.sources[1]; len(s.young)+len(s.aged) > 2*rememberIDs {
		t.Errorf("%d ids of one source", len(s.young)+len(s.aged))
	}
	last := 3*rememberIDs - rememberIDs
	if m.Add(1, ID{byte(last), byte(last >> 8), byte(last >> 16)}) {
		t.Error("one of the newest is forgotten")
	}
	for i := range 2 * rememberCount {
		m.Add(i, ID{1})
	}
	if len(m.sources) > rememberCount {
		t.Errorf("%d sources", len(m.sources))
	}
}
