package record

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"testing"
)

// The secrets and records of RFC 8448, section 3, after its handshake.
const (
	clientSecret = "9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5"
	serverSecret = "a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643"

	ticketRecord = "17030300de3a6b8f90414a97d6959c3487680de5134a2b240e6cffac116e95d41d6af8f6b580dcf3d11d63c758db289a" +
		"015940252f55713e061dc13e078891a38efbcf5753ad8ef170ad3c7353d16d9da773b9ca7f2b9fa1b6c0d4a3d03f75e0" +
		"9c30ba1e62972ac46f75f7b981be63439b2999ce13064615139891d5e4c5b406f16e3fc181a77ca475840025db2f0a77" +
		"f81b5ab05b94c01346755f69232c86519d86cbeeac87aac347d143f9605d64f650db4d023e70e952ca49fe5137121c74" +
		"bc2697687e248746d6df353005f3bce18696129c8153556b3b6c6779b37bf15985684f"
	clientDataRecord  = "1703030043a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f2b9819a8a5b46b395bd54a9a20441e2b62974e1f5a6292a2977014bd1e3deae63aeebb21694915e4"
	serverDataRecord  = "17030300432e937e11ef4ac740e538ad36005fc4a46932fc3225d05f82aa1b36e30efaf97d90e6dffc602dcb501a59a8fcc49c4bf2e5f0a21c0047c2abf332540dd032e167c2955d"
	clientAlertRecord = "1703030013c9872760655666b74d7ff1153efd6db6d0b0e3"
	serverAlertRecord = "1703030013b58fd67166ebf599d24720cfbe7efa7a8864a9"
)

func unhex(t testing.TB, text string) []byte {
	t.Helper()
	p, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// exampleLayers are both ends of the connection of RFC 8448.
func exampleLayers(t testing.TB) (client, server *Layer) {
	t.Helper()
	make := func(in, out string, isClient bool) *Layer {
		l, err := newLayer(tls.TLS_AES_128_GCM_SHA256, unhex(t, in), unhex(t, out), isClient)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	return make(serverSecret, clientSecret, true), make(clientSecret, serverSecret, false)
}

// exampleData is what both sides send in RFC 8448.
func exampleData() []byte {
	p := make([]byte, 50, 51)
	for i := range p {
		p[i] = byte(i)
	}
	return p
}

func TestKeysAreThoseOfRFC8448(t *testing.T) {
	s := suites[tls.TLS_AES_128_GCM_SHA256]
	for secret, want := range map[string][2]string{
		clientSecret: {"17422dda596ed5d9acd890e3c63f5051", "5b78923dee08579033e523d9"},
		serverSecret: {"9f02283b6c9c07efc26bb9f2ac92e356", "cf782b88dd83549aadf1e984"},
	} {
		key, _ := s.expand(unhex(t, secret), "key", 16)
		iv, _ := s.expand(unhex(t, secret), "iv", 12)
		if hex.EncodeToString(key) != want[0] || hex.EncodeToString(iv) != want[1] {
			t.Errorf("key %x, iv %x; want %s", key, iv, want)
		}
	}
}

func TestRecordsAreThoseOfRFC8448(t *testing.T) {
	client, server := exampleLayers(t)
	out := make([]byte, SealedSize(50))
	n, err := client.Seal(out, exampleData())
	if err != nil || hex.EncodeToString(out[:n]) != clientDataRecord {
		t.Errorf("%x, %v", out[:n], err)
	}
	if n = client.SealAlert(out, CloseNotify); hex.EncodeToString(out[:n]) != clientAlertRecord {
		t.Errorf("%x", out[:n])
	}
	server.out.count = 1 // it has sent the ticket
	if n, _ = server.Seal(out, exampleData()); hex.EncodeToString(out[:n]) != serverDataRecord {
		t.Errorf("%x", out[:n])
	}
	if n = server.SealAlert(out, CloseNotify); hex.EncodeToString(out[:n]) != serverAlertRecord {
		t.Errorf("%x", out[:n])
	}
	for name, tc := range map[string]struct {
		to      *Layer
		records string
	}{
		"client": {client, ticketRecord + serverDataRecord + serverAlertRecord},
		"server": {server, clientDataRecord + clientAlertRecord},
	} {
		got, _, err := openAll(tc.to, unhex(t, tc.records))
		if !bytes.Equal(got, exampleData()) || !errors.Is(err, io.EOF) {
			t.Errorf("%s: %x, %v", name, got, err)
		}
	}
}

// openAll opens all records of p, and returns their data and what is left of p.
func openAll(l *Layer, p []byte) (data, rest []byte, err error) {
	for {
		n, size, err := l.Open(p)
		if size > 0 {
			data = append(data, p[HeaderSize:HeaderSize+size]...)
		}
		p = p[n:]
		if err != nil || n == 0 {
			return data, p, err
		}
	}
}

// Each is what one end must not send: the contents of records, with their types.
func TestViolationsAreToldByTheirAlert(t *testing.T) {
	type content struct {
		kind byte
		data []byte
	}
	update := func(request byte) content { return content{typeHandshake, []byte{24, 0, 0, 1, request}} }
	ticket := content{typeHandshake, []byte{4, 0, 0, 2, 1, 1}}
	repeat := func(n int, c content) (all []content) {
		for range n {
			all = append(all, c)
		}
		return all
	}
	for name, tc := range map[string]struct {
		contents []content
		toServer bool
		want     tls.AlertError
	}{
		"no content type":                   {contents: []content{{0, make([]byte, 9)}}, want: alertUnexpectedMessage},
		"an unknown content type":           {contents: []content{{99, []byte{1}}}, want: alertUnexpectedMessage},
		"a change_cipher_spec":              {contents: []content{{20, []byte{1}}}, want: alertUnexpectedMessage},
		"an alert of one byte":              {contents: []content{{typeAlert, []byte{1}}}, want: alertDecodeError},
		"two alerts in a record":            {contents: []content{{typeAlert, []byte{1, 0, 1, 0}}}, want: alertDecodeError},
		"an empty handshake record":         {contents: []content{{typeHandshake, nil}}, want: alertUnexpectedMessage},
		"a Finished":                        {contents: []content{{typeHandshake, []byte{20, 0, 0, 0}}}, want: alertUnexpectedMessage},
		"a CertificateRequest":              {contents: []content{{typeHandshake, []byte{13, 0, 0, 3, 0, 0, 0}}}, want: alertUnexpectedMessage},
		"a client's ticket":                 {contents: []content{ticket}, toServer: true, want: alertUnexpectedMessage},
		"a ticket of 16 MiB":                {contents: []content{{typeHandshake, []byte{4, 255, 255, 255}}}, want: alertDecodeError},
		"a KeyUpdate of two bytes":          {contents: []content{{typeHandshake, []byte{24, 0, 0, 2, 0, 0}}}, want: alertDecodeError},
		"a KeyUpdate that asks for more":    {contents: []content{update(2)}, want: alertIllegalParameter},
		"something behind a KeyUpdate":      {contents: []content{{typeHandshake, []byte{24, 0, 0, 1, 0, 4}}}, want: alertUnexpectedMessage},
		"data within a message":             {contents: []content{{typeHandshake, []byte{4, 0}}, {typeApplication, []byte{1}}}, want: alertUnexpectedMessage},
		"an empty record within a message":  {contents: []content{{typeHandshake, []byte{4, 0}}, {typeApplication, nil}}, want: alertUnexpectedMessage},
		"an alert within a message":         {contents: []content{{typeHandshake, []byte{4}}, {typeAlert, []byte{1, 0}}}, want: alertUnexpectedMessage},
		"empty records without end":         {contents: repeat(maxIdle+1, content{typeApplication, nil}), want: alertUnexpectedMessage},
		"tickets without end":               {contents: repeat(maxIdle+1, ticket), want: alertUnexpectedMessage},
		"KeyUpdates without end":            {contents: repeat(maxIdle+1, update(0)), want: alertUnexpectedMessage},
		"KeyUpdates that ask, without end":  {contents: repeat(maxIdle+2, update(1)), want: alertUnexpectedMessage},
		"user_canceled without end":         {contents: repeat(maxIdle+1, content{typeAlert, []byte{1, 90}}), want: alertUnexpectedMessage},
		"more content than a record may":    {contents: []content{{typeApplication, make([]byte, MaxData+1)}}, want: alertRecordOverflow},
		"more padding than a record may":    {contents: []content{{0, make([]byte, MaxData+1)}}, want: alertRecordOverflow},
		"a ticket in records of a byte":     {contents: append([]content{{typeHandshake, []byte{4, 0, 255, 255}}}, repeat(maxIdle, content{typeHandshake, []byte{1}})...), want: alertUnexpectedMessage},
		"a message that is begun and not 4": {contents: []content{{typeHandshake, []byte{24, 0, 0}}, {typeHandshake, []byte{9}}}, want: alertDecodeError},
	} {
		t.Run(name, func(t *testing.T) {
			client, server := exampleLayers(t)
			from, to := server, client
			if tc.toServer {
				from, to = client, server
			}
			var records []byte
			for _, c := range tc.contents {
				record := make([]byte, overhead+len(c.data))
				from.out.seal(record, append(bytes.Clone(c.data), 0)[:len(c.data)], c.kind)
				records = append(records, record...)
				if c.kind == typeHandshake && len(c.data) == 5 && c.data[0] == typeKeyUpdate {
					from.out.update()
				}
			}
			_, _, err := openAll(to, records)
			v, ok := errors.AsType[*Violation](err)
			if !ok || v.Alert != tc.want {
				t.Fatalf("got %v, want the alert %v", err, tc.want)
			}
			if _, _, again := to.Open(records); !errors.Is(again, err) {
				t.Errorf("then comes %v", again)
			}
		})
	}
}

// What is wrong outside of the protection, at each byte and length.
func TestAForgedRecordIsNotOpened(t *testing.T) {
	for i := range len(clientDataRecord) / 2 {
		_, server := exampleLayers(t)
		record := unhex(t, clientDataRecord)
		record[i] ^= 1
		n, size, err := server.Open(append(record, make([]byte, 1<<10)...))
		if _, ok := errors.AsType[*Violation](err); !ok || n != 0 || size != 0 {
			t.Fatalf("byte %d: %d, %d, %v", i, n, size, err)
		}
	}
	for length, want := range map[int]tls.AlertError{0: alertBadRecordMAC, 16: alertBadRecordMAC, maxCiphertext: alertBadRecordMAC, maxCiphertext + 1: alertRecordOverflow, 65535: alertRecordOverflow} {
		_, server := exampleLayers(t)
		record := make([]byte, HeaderSize+length)
		copy(record, []byte{23, 3, 3, byte(length >> 8), byte(length)})
		_, _, err := server.Open(record)
		if v, ok := errors.AsType[*Violation](err); !ok || v.Alert != want {
			t.Errorf("%d bytes: got %v, want the alert %v", length, err, want)
		}
	}
	// It is known by its header already.
	_, server := exampleLayers(t)
	if _, _, err := server.Open([]byte{23, 3, 3, 0xff, 0xff}); err == nil {
		t.Error("too large a record is waited for")
	}
}

func TestPartOfARecordIsWaitedFor(t *testing.T) {
	record := unhex(t, clientDataRecord)
	_, server := exampleLayers(t)
	for i := range record {
		if n, size, err := server.Open(record[:i]); n != 0 || size != 0 || err != nil {
			t.Fatalf("%d bytes: %d, %d, %v", i, n, size, err)
		}
	}
	if got, _, err := openAll(server, record); !bytes.Equal(got, exampleData()) || err != nil {
		t.Fatalf("%x, %v", got, err)
	}
}

// What may come beside data: padding, tickets in pieces, KeyUpdates that are answered before the next data, user_canceled.
func TestWhatIsAllowedBesideData(t *testing.T) {
	client, server := exampleLayers(t)
	var records []byte
	send := func(kind byte, data string) {
		record := make([]byte, overhead+len(data))
		server.out.seal(record, append([]byte(data), 0)[:len(data)], kind)
		records = append(records, record...)
	}
	send(0, "padded\x17\x00\x00")
	send(0, "\x17\x00\x00") // nothing, padded
	send(typeHandshake, "\x04\x00\x00\x03abc\x04\x00\x00\x05de")
	send(typeHandshake, "fgh\x18\x00")
	send(typeHandshake, "\x00\x01\x01")
	server.out.update()
	send(typeAlert, "\x01\x5a")
	send(typeApplication, " and more")
	send(typeAlert, "\x02\x00")
	send(typeApplication, "too late")
	got, _, err := openAll(client, records)
	if string(got) != "padded and more" || !errors.Is(err, io.EOF) {
		t.Fatalf("%q, %v", got, err)
	}
	out := make([]byte, SealedSize(50))
	for range 2 { // the answer comes once
		n, err := client.Seal(out, exampleData())
		if err != nil {
			t.Fatal(err)
		}
		if got, rest, err := openAll(server, out[:n]); !bytes.Equal(got, exampleData()) || len(rest) > 0 || err != nil {
			t.Fatalf("%x, %d bytes are left, %v", got, len(rest), err)
		}
	}
	if client.out.count != 2 || server.in.count != 2 {
		t.Errorf("%d records were sealed since the keys were updated, and %d opened", client.out.count, server.in.count)
	}
}

// A peer that asks for our keys to be updated as often as we send is served for ever.
func TestAnAnsweredKeyUpdateIsNoFlood(t *testing.T) {
	client, server := exampleLayers(t)
	out := make([]byte, SealedSize(50))
	for range 3 * maxIdle {
		n := server.out.seal(out, []byte{24, 0, 0, 1, 1, 0}[:5], typeHandshake)
		server.out.update()
		if _, rest, err := openAll(client, out[:n]); err != nil || len(rest) > 0 {
			t.Fatal(err)
		}
		if n, err := client.Seal(out, exampleData()); err != nil {
			t.Fatal(err)
		} else if _, _, err := openAll(server, out[:n]); err != nil {
			t.Fatal(err)
		}
	}
}

func TestKeysAreRenewedBeforeTheirLimit(t *testing.T) {
	client, server := exampleLayers(t)
	old := bytes.Clone(client.out.secret)
	client.out.count, server.in.count = renewAfter-1, renewAfter-1
	out := make([]byte, SealedSize(50))
	for i, want := range []uint64{renewAfter, 1, 2} {
		n, err := client.Seal(out, exampleData())
		if err != nil || client.out.count != want {
			t.Fatalf("record %d is number %d of its key, want %d; %v", i, client.out.count, want, err)
		}
		if got, _, err := openAll(server, out[:n]); !bytes.Equal(got, exampleData()) || err != nil {
			t.Fatalf("%x, %v", got, err)
		}
	}
	if bytes.Equal(old, client.out.secret) || !bytes.Equal(client.out.secret, server.in.secret) {
		t.Error("the secret is the old one, or not the same on both sides")
	}
}

func TestSealLeavesWhatItWasGiven(t *testing.T) {
	for _, size := range []int{1, MaxData - 1, MaxData, MaxData + 1, 4*MaxData - 1} {
		client, server := exampleLayers(t)
		whole := make([]byte, size+1)
		for i := range whole {
			whole[i] = byte(i * 7)
		}
		before := bytes.Clone(whole)
		out := make([]byte, SealedSize(size))
		n, err := client.Seal(out, whole[:size])
		if err != nil || !bytes.Equal(before, whole) {
			t.Fatalf("%d bytes: they were changed; %v", size, err)
		}
		if got, rest, err := openAll(server, out[:n]); !bytes.Equal(got, whole[:size]) || len(rest) > 0 || err != nil {
			t.Errorf("%d bytes: %d are opened, %v", size, len(got), err)
		}
	}
}

func TestSealingAndOpeningAllocateNothing(t *testing.T) {
	client, server := exampleLayers(t)
	p, out := make([]byte, 60<<10, 64<<10), make([]byte, SealedSize(60<<10))
	if allocations := testing.AllocsPerRun(100, func() {
		n, err := client.Seal(out, p)
		for at := 0; at < n && err == nil; {
			var took int
			took, _, err = server.Open(out[at:n])
			at += took
		}
		if err != nil {
			t.Fatal(err)
		}
	}); allocations > 0 {
		t.Errorf("%v allocations", allocations)
	}
}

func FuzzOpen(f *testing.F) {
	f.Add(byte(typeHandshake), []byte{24, 0, 0, 1, 1}, []byte{23, 3, 3, 0, 17})
	f.Add(byte(typeApplication), []byte("data"), []byte{22, 3, 3, 0, 1, 0})
	f.Add(byte(typeAlert), []byte{1, 0}, []byte{})
	f.Add(byte(typeHandshake), unhex(f, "040000020000"), unhex(f, clientDataRecord))
	f.Add(byte(0), []byte{0, 0, 23, 0}, unhex(f, serverAlertRecord))
	f.Fuzz(func(t *testing.T, kind byte, content, forged []byte) {
		for _, forward := range []bool{true, false} {
			client, server := exampleLayers(t)
			from, to := client, server
			if forward {
				from, to = server, client
			}
			content = content[:min(len(content), MaxData+1)]
			record := make([]byte, overhead+len(content))
			from.out.seal(record, append(bytes.Clone(content), 0)[:len(content)], kind) // a peer that means harm
			p := append(record, forged...)                                              // then one that has no key
			behind := bytes.Clone(forged)
			n, size, err := to.Open(p)
			if err != nil && n+size > 0 || n > len(record) || size > len(content) {
				t.Fatal(n, size, err)
			}
			if !bytes.Equal(p[len(record):], behind) {
				t.Fatal("what is behind the record was changed")
			}
			if kind == typeApplication && err == nil && size > 0 && !bytes.Equal(p[HeaderSize:HeaderSize+size], content) {
				t.Fatal("other data is opened")
			}
			if err == nil {
				if _, size, err := to.Open(p[n:]); size > 0 {
					t.Fatalf("%d bytes of a forged record, %v", size, err)
				}
			}
		}
	})
}

func BenchmarkLayer(b *testing.B) {
	for _, size := range []int{128, MaxData, 60 << 10} {
		p, out := make([]byte, size, size+1), make([]byte, SealedSize(size))
		b.Run(fmt.Sprintf("seal %d", size), func(b *testing.B) {
			client, _ := exampleLayers(b)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := client.Seal(out, p); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	b.Run("seal and open", func(b *testing.B) {
		client, server := exampleLayers(b)
		p, out := make([]byte, MaxData, MaxData+1), make([]byte, SealedSize(MaxData))
		b.SetBytes(MaxData)
		b.ReportAllocs()
		for b.Loop() {
			n, _ := client.Seal(out, p)
			if _, _, err := server.Open(out[:n]); err != nil {
				b.Fatal(err)
			}
		}
	})
}
