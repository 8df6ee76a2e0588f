package hclfile

import (
	"encoding"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"
)

// Block is where a block is written. A struct that has a field of this type, untagged, gets the block's place in it when
// it is decoded.
type Block struct {
	Pos  Pos
	keys map[string]Pos
}

// Key is the place of a key of the block, or of the block when the key is not set.
func (b Block) Key(name string) Pos {
	if pos, ok := b.keys[fold(name)]; ok {
		return pos
	}
	return b.Pos
}

// Has says whether the key is set in the block.
func (b Block) Has(name string) bool {
	_, ok := b.keys[fold(name)]
	return ok
}

// Decode sets the struct that into points to. What the file does not set keeps its value, so defaults are set before.
//
// The fields of a struct with `hcl:"name"` tags are those keys, exactly; fields without a tag are left alone, and
// `hcl:"name,label"` marks the one string that takes the label of a labelled block: namespace "shop" { … }. The fields of
// a struct without any tag are matched as Consul matches them: by name whatever its case, or in snake case, or by an
// `alias` tag.
//
// A slice of structs takes repeated blocks, or a list of them, appended; a map of structs takes labelled blocks. Other types: string, bool,
// integers and floats, time.Duration as "5s", anything that unmarshals text, slices and string maps of these, pointers to
// them for what may be absent, and any or map[string]any for whatever is there. All errors are *Error, joined in order of line.
func (f *File) Decode(into any) error {
	d := decoder{path: f.path, shapes: make(map[reflect.Type]*shape)}
	d.object(f.root, 0, reflect.ValueOf(into).Elem(), "")
	return Join(d.errs...)
}

type decoder struct {
	path   string
	shapes map[reflect.Type]*shape // of the struct types met so far
	errs   []error
}

func (d *decoder) at(line int) Pos { return Pos{File: d.path, Line: line} }

func (d *decoder) errorf(line int, format string, args ...any) {
	d.errs = append(d.errs, d.at(line).Errorf(format, args...))
}

var (
	blockType    = reflect.TypeFor[Block]()
	durationType = reflect.TypeFor[time.Duration]()
	genericType  = reflect.TypeFor[map[string]any]()
)

// field is one struct field that a key sets.
type field struct {
	name  string // as shown to the operator
	index []int
}

// shape is how a struct type is decoded.
type shape struct {
	exact  bool // keys are compared as they are, not folded
	fields map[string]*field
	label  []int // index of the field that takes the label
	block  []int // index of the Block
}

func (d *decoder) shapeOf(t reflect.Type) *shape {
	s := d.shapes[t]
	if s == nil {
		s = newShape(t)
		d.shapes[t] = s
	}
	return s
}

func newShape(t reflect.Type) *shape {
	s := &shape{fields: make(map[string]*field), exact: slices.ContainsFunc(reflect.VisibleFields(t), func(f reflect.StructField) bool { return f.Tag.Get("hcl") != "" })}
	for _, f := range reflect.VisibleFields(t) {
		tag, option, _ := strings.Cut(f.Tag.Get("hcl"), ",")
		switch {
		case f.Type == blockType:
			s.block = f.Index
		case !f.IsExported() || f.Anonymous || s.exact && tag == "":
		case option == "label":
			s.label = f.Index
		case s.exact:
			s.fields[tag] = &field{name: tag, index: f.Index}
		default:
			to := &field{name: f.Name, index: f.Index}
			s.fields[fold(f.Name)] = to
			if alias := f.Tag.Get("alias"); alias != "" {
				s.fields[fold(alias)] = to
			}
		}
	}
	return s
}

func (s *shape) find(key string) *field {
	if !s.exact {
		key = fold(key)
	}
	return s.fields[key]
}

func (s *shape) known() string {
	var names []string
	for _, f := range s.fields {
		names = append(names, f.name)
	}
	slices.Sort(names)
	return strings.Join(slices.Compact(names), ", ")
}

// object sets the struct v from the block n. name is the block's key, "" for the whole file, and line the key's.
func (d *decoder) object(n *node, line int, v reflect.Value, name string) {
	if n.kind != object {
		d.errorf(n.line, "%q is %s: write it as a block", name, n.kind)
		return
	}
	s := d.shapeOf(v.Type())
	type setting struct {
		field *field
		items []item
	}
	settings := make([]setting, 0, len(n.items))
	for i, it := range n.items {
		f := s.find(it.key)
		if f == nil {
			d.unknown(it, name, s)
			continue
		}
		if it.value.kind == null {
			continue
		}
		if at := slices.IndexFunc(settings, func(o setting) bool { return o.field == f }); at >= 0 {
			settings[at].items = append(settings[at].items, it)
		} else {
			settings = append(settings, setting{f, n.items[i : i+1 : i+1]})
		}
	}
	for _, set := range settings {
		d.value(set.items, v.FieldByIndex(set.field.index))
	}
	if s.block != nil {
		keys := make(map[string]Pos, len(settings))
		for _, set := range settings {
			keys[fold(set.items[0].key)] = d.at(set.items[0].line)
		}
		v.FieldByIndex(s.block).Set(reflect.ValueOf(Block{Pos: d.at(line), keys: keys}))
	}
}

func (d *decoder) unknown(it item, block string, s *shape) {
	in := "the file"
	if block != "" {
		in = fmt.Sprintf("block %q", block)
	}
	d.errorf(it.line, "unknown key %q in %s; known keys: %s", it.key, in, s.known())
}

// value sets v from all the items of one key.
func (d *decoder) value(items []item, v reflect.Value) {
	for v.Kind() == reflect.Pointer {
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		v = v.Elem()
	}
	if repeats(v.Type()) {
		d.blocks(items, v)
		return
	}
	it := items[0]
	if v.Type() == reflect.TypeFor[any]() || v.Type() == genericType {
		d.set(it, v, d.repeated(items))
		return
	}
	for _, again := range items[1:] {
		d.errorf(again.line, "%q is set twice, first at line %d: remove one of them", again.key, it.line)
	}
	if unmarshaler, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		if s, ok := d.text(it); ok {
			if err := unmarshaler.UnmarshalText([]byte(s)); err != nil {
				d.errorf(it.line, "%q: %w", it.key, err)
			}
		}
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.block(it, v)
	case reflect.Slice:
		d.slice(it, v)
	case reflect.Map:
		d.mapping(items, v)
	default:
		d.scalar(it, v)
	}
}

// repeats says whether t holds blocks that may be repeated.
func repeats(t reflect.Type) bool {
	return t.Kind() == reflect.Slice && isBlock(t.Elem()) || t.Kind() == reflect.Map && t != genericType && isBlock(t.Elem())
}

func isBlock(t reflect.Type) bool {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return t == genericType || t.Kind() == reflect.Struct && !reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]())
}

// blocks sets the slice or map of structs v from repeated blocks or lists of them.
func (d *decoder) blocks(items []item, v reflect.Value) {
	if v.Kind() == reflect.Map {
		d.mapping(items, v)
		return
	}
	for _, it := range items {
		for _, n := range flatten([]*node{it.value}) {
			line := n.line
			if it.value.kind == object {
				line = it.line
			}
			for _, one := range d.labelled(item{it.key, line, n}, v.Type().Elem()) {
				element := reflect.New(v.Type().Elem()).Elem()
				d.value([]item{one}, element)
				v.Set(reflect.Append(v, element))
			}
		}
	}
}

// labelled splits a block whose type t takes a label into one item for each label; any other block is one item.
func (d *decoder) labelled(it item, t reflect.Type) []item {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct || d.shapeOf(t).label == nil || it.value.kind != object {
		return []item{it}
	}
	var all []item
	for _, inner := range it.value.items {
		all = append(all, item{it.key, inner.line, &node{line: inner.line, kind: object, items: []item{inner}}})
	}
	if len(all) == 0 {
		d.errorf(it.line, "%q has no label: write %s \"name\" { … }", it.key, it.key)
	}
	return all
}

// block sets the struct v from one block, label and all.
func (d *decoder) block(it item, v reflect.Value) {
	s := d.shapeOf(v.Type())
	if s.label == nil {
		d.object(it.value, it.line, v, it.key)
		return
	}
	if it.value.kind != object || len(it.value.items) != 1 || it.value.items[0].value.kind != object {
		d.errorf(it.line, "%q wants one label: write %s \"name\" { … }", it.key, it.key)
		return
	}
	inner := it.value.items[0]
	d.object(inner.value, it.line, v, it.key)
	v.FieldByIndex(s.label).SetString(inner.key)
}

// slice sets the slice v from a list of scalars.
func (d *decoder) slice(it item, v reflect.Value) {
	if it.value.kind != list {
		d.errorf(it.line, "%q is %s: write it as a list [ … ]", it.key, it.value.kind)
		return
	}
	all := reflect.MakeSlice(v.Type(), 0, len(it.value.list))
	for _, n := range it.value.list {
		element := reflect.New(v.Type().Elem()).Elem()
		d.value([]item{{it.key, n.line, n}}, element)
		all = reflect.Append(all, element)
	}
	v.Set(all)
}

// mapping sets the map v, whose keys are strings, from the items of one block or of several labelled ones.
func (d *decoder) mapping(items []item, v reflect.Value) {
	m := reflect.MakeMap(v.Type())
	first := make(map[string]int)
	for _, it := range items {
		if it.value.kind != object {
			d.errorf(it.line, "%q is %s: write it as a block", it.key, it.value.kind)
			continue
		}
		for _, inner := range it.value.items {
			if line, twice := first[inner.key]; twice {
				d.errorf(inner.line, "%q is set twice in %q, first at line %d: remove one of them", inner.key, it.key, line)
				continue
			}
			first[inner.key] = inner.line
			element := reflect.New(v.Type().Elem()).Elem()
			d.value([]item{inner}, element)
			m.SetMapIndex(reflect.ValueOf(inner.key).Convert(v.Type().Key()), element)
		}
	}
	v.Set(m)
}
