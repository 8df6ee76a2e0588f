package hclfile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/hashicorp/hcl/hcl/scanner"
	"github.com/hashicorp/hcl/hcl/token"
)

type kind uint8

const (
	null kind = iota
	object
	list
	text
	integer
	float
	boolean
)

func (k kind) String() string {
	return [...]string{"null", "a block", "a list", "a string", "a number", "a number with a fraction", "a boolean"}[k]
}

// node is one value of a file, whatever its format. A block with labels is a block in a block.
type node struct {
	line  int
	kind  kind
	items []item  // of an object, in the file's order; keys may repeat
	list  []*node // of a list
	value any     // of all else: string, int64, float64, bool, nil
}

type item struct {
	key   string
	line  int
	value *node
}

// hclParser reads HCL version 1 off the library's scanner. The library's parser is not used: it recurses without a
// bound, and drops a key whose value is missing at the end of the file.
type hclParser struct {
	path    string
	scanner *scanner.Scanner
	tok     token.Token
	err     error // the scanner's first
}

func parseHCL(path string, data []byte) (root *node, err error) {
	p := &hclParser{path: path, scanner: scanner.New(bytes.ReplaceAll(data, []byte("\r\n"), []byte("\n")))}
	p.scanner.Error = func(pos token.Pos, msg string) {
		if p.err == nil {
			p.err = p.at(pos.Line).Errorf("read HCL: %s", msg)
		}
	}
	defer func() { // the scanner gives up on some malformed input by a panic
		if r := recover(); r != nil {
			root, err = nil, p.at(p.tok.Pos.Line).Errorf("read HCL: %v", r)
		}
	}()
	p.next()
	root, err = p.items(1, token.EOF, 0)
	if p.err != nil {
		return nil, p.err
	}
	return root, err
}

func (p *hclParser) at(line int) Pos { return Pos{File: p.path, Line: line} }

// next reads the next token that is not a comment into p.tok.
func (p *hclParser) next() {
	for {
		p.tok = p.scanner.Scan()
		if p.err != nil {
			p.tok.Type = token.ILLEGAL
		}
		if p.tok.Type != token.COMMENT {
			return
		}
	}
}

func (p *hclParser) unexpected(want string) error {
	got := fmt.Sprintf("%.40q", p.tok.Text)
	if p.tok.Type == token.EOF {
		got = "the end of the file"
	}
	return p.at(p.tok.Pos.Line).Errorf("read HCL: expected %s, found %s", want, got)
}

// items reads "key = value" and "key label… { … }" up to the token end, which it leaves in p.tok.
func (p *hclParser) items(line int, end token.Type, depth int) (*node, error) {
	if depth > maxDepth {
		return nil, p.at(line).Errorf("read HCL: nested more than %d deep", maxDepth)
	}
	n := &node{line: line, kind: object}
	for p.tok.Type != end {
		if p.tok.Type == token.EOF {
			return nil, p.at(line).Errorf("read HCL: the '{' of this line is never closed")
		}
		it, err := p.item(depth)
		if err != nil {
			return nil, err
		}
		n.items = append(n.items, it)
		if p.tok.Type == token.COMMA {
			p.next()
		}
	}
	return n, nil
}

func (p *hclParser) item(depth int) (item, error) {
	var keys []item
	for p.tok.Type == token.IDENT || p.tok.Type == token.STRING {
		name := p.tok.Text
		if p.tok.Type == token.STRING {
			name = p.tok.Value().(string)
		}
		keys = append(keys, item{key: name, line: p.tok.Pos.Line})
		if len(keys) > maxDepth {
			return item{}, p.at(keys[0].line).Errorf("read HCL: block with more than %d labels", maxDepth)
		}
		p.next()
	}
	switch {
	case len(keys) == 0:
		return item{}, p.unexpected("a key")
	case p.tok.Type == token.ASSIGN && len(keys) == 1:
		p.next()
	case p.tok.Type != token.LBRACE && len(keys) == 1:
		return item{}, p.unexpected(fmt.Sprintf("'=' or '{' after %q", keys[0].key))
	case p.tok.Type != token.LBRACE:
		return item{}, p.unexpected(fmt.Sprintf("'{' after the labels of %q", keys[0].key))
	}
	value, err := p.value(depth + len(keys))
	if err != nil {
		return item{}, err
	}
	for i := len(keys) - 1; i > 0; i-- {
		keys[i].value = value
		value = &node{line: keys[0].line, kind: object, items: []item{keys[i]}}
	}
	keys[0].value = value
	return keys[0], nil
}

// value reads one value and the token after it.
func (p *hclParser) value(depth int) (n *node, err error) {
	line := p.tok.Pos.Line
	switch p.tok.Type {
	case token.LBRACE:
		p.next()
		n, err = p.items(line, token.RBRACE, depth)
	case token.LBRACK:
		p.next()
		n, err = p.elements(line, depth)
	case token.STRING, token.HEREDOC:
		n = &node{line: line, kind: text, value: p.tok.Value()}
	case token.NUMBER:
		n = &node{line: line, kind: integer, value: p.tok.Value()}
	case token.FLOAT:
		n = &node{line: line, kind: float, value: p.tok.Value()}
	case token.BOOL:
		n = &node{line: line, kind: boolean, value: p.tok.Value()}
	default:
		err = p.unexpected("a value")
	}
	if err != nil {
		return nil, err
	}
	p.next()
	return n, nil
}

// elements reads the elements of a list up to its ']', which it leaves in p.tok.
func (p *hclParser) elements(line, depth int) (*node, error) {
	if depth > maxDepth {
		return nil, p.at(line).Errorf("read HCL: nested more than %d deep", maxDepth)
	}
	n := &node{line: line, kind: list}
	for p.tok.Type != token.RBRACK {
		element, err := p.value(depth + 1)
		if err != nil {
			return nil, err
		}
		n.list = append(n.list, element)
		switch p.tok.Type {
		case token.COMMA:
			p.next()
		case token.RBRACK:
		default:
			return nil, p.unexpected("',' or ']' in a list")
		}
	}
	return n, nil
}

// jsonParser reads JSON token by token, because only so the line of each value is known.
type jsonParser struct {
	path    string
	data    []byte
	decoder *json.Decoder
	offset  int // up to which lines are counted
	line    int
}

func parseJSON(path string, data []byte) (*node, error) {
	p := &jsonParser{path: path, data: data, decoder: json.NewDecoder(bytes.NewReader(data)), line: 1}
	p.decoder.UseNumber()
	root, err := p.value(0)
	if err != nil {
		return nil, err
	}
	if root.kind != object {
		return nil, p.at().Errorf("read JSON: expected an object, found %s", root.kind)
	}
	if _, err := p.decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, p.at().Errorf("read JSON: data after the end of the object")
	}
	return root, nil
}

// at is the place of the last token.
func (p *jsonParser) at() Pos {
	end := int(p.decoder.InputOffset())
	p.line += bytes.Count(p.data[p.offset:end], []byte("\n"))
	p.offset = end
	return Pos{File: p.path, Line: p.line}
}

func (p *jsonParser) token() (json.Token, int, error) {
	t, err := p.decoder.Token()
	switch syntax, isSyntax := errors.AsType[*json.SyntaxError](err); {
	case isSyntax:
		line := 1 + bytes.Count(p.data[:min(int(syntax.Offset), len(p.data))], []byte("\n"))
		return nil, 0, Pos{File: p.path, Line: line}.Errorf("read JSON: %w", err)
	case errors.Is(err, io.EOF):
		return nil, 0, p.at().Errorf("read JSON: unexpected end of the file")
	case err != nil:
		return nil, 0, p.at().Errorf("read JSON: %w", err)
	}
	return t, p.at().Line, nil
}

func (p *jsonParser) value(depth int) (*node, error) {
	t, line, err := p.token()
	if err != nil {
		return nil, err
	}
	if depth > maxDepth {
		return nil, p.at().Errorf("read JSON: nested more than %d deep", maxDepth)
	}
	switch t := t.(type) {
	case json.Delim:
		return p.container(t, line, depth)
	case json.Number:
		if i, err := t.Int64(); err == nil {
			return &node{line: line, kind: integer, value: i}, nil
		}
		f, err := t.Float64()
		if err != nil {
			return nil, p.at().Errorf("read JSON: number %.40s is out of range", t)
		}
		return &node{line: line, kind: float, value: f}, nil
	case string:
		return &node{line: line, kind: text, value: t}, nil
	case bool:
		return &node{line: line, kind: boolean, value: t}, nil
	}
	return &node{line: line, kind: null}, nil
}

func (p *jsonParser) container(open json.Delim, line, depth int) (*node, error) {
	n := &node{line: line, kind: list}
	if open == '{' {
		n.kind = object
	}
	for p.decoder.More() {
		var it item
		if n.kind == object {
			key, line, err := p.token()
			if err != nil {
				return nil, err
			}
			it.key, it.line = key.(string), line
		}
		value, err := p.value(depth + 1)
		if err != nil {
			return nil, err
		}
		if n.kind == list {
			n.list = append(n.list, value)
			continue
		}
		it.value = value
		n.items = append(n.items, it)
	}
	_, _, err := p.token()
	return n, err
}
