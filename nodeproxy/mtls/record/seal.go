package record

import (
	"crypto/tls"
	"encoding/binary"
)

// Seal seals p, application data, into dst and returns how much of it that takes. dst must have SealedSize(len(p)) bytes and
// not overlap p. p must have a byte of capacity behind its end: each byte behind a record's part is changed during the call.
func (l *Layer) Seal(dst, p []byte) (n int, err error) {
	for len(p) > 0 {
		if l.out.count >= renewAfter || l.owed.Load() {
			l.owed.Store(false)
			n += l.out.seal(dst[n:], append(make([]byte, 0, updateSize+1), typeKeyUpdate, 0, 0, 1, updateNotRequested), typeHandshake)
			if err := l.out.update(); err != nil {
				return 0, err
			}
		}
		part := p[:min(len(p), MaxData)]
		n += l.out.seal(dst[n:], part, typeApplication)
		p = p[len(part):]
	}
	return n, nil
}

// SealAlert seals an alert into dst, which must have AlertSize bytes. After CloseNotify nothing may be sealed.
func (l *Layer) SealAlert(dst []byte, alert tls.AlertError) (n int) {
	const warning, fatal = 1, 2
	level := byte(fatal)
	if alert == CloseNotify {
		level = warning
	}
	return l.out.seal(dst, append(make([]byte, 0, 3), level, byte(alert)), typeAlert)
}

// seal makes one record of p. The type of the content goes behind p, so that nothing is copied but by the cipher.
func (d *direction) seal(dst, p []byte, content byte) (n int) {
	inner := p[:len(p)+1]
	behind := inner[len(p)]
	inner[len(p)] = content
	size := len(inner) + tagSize
	record := dst[:HeaderSize+size]
	record[0], record[1], record[2] = typeApplication, 3, 3
	binary.BigEndian.PutUint16(record[3:], uint16(size))
	d.aead.Seal(record[HeaderSize:HeaderSize], d.next(), inner, record[:HeaderSize])
	inner[len(p)] = behind
	return len(record)
}
