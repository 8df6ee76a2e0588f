package hclfile

import (
	"math"
	"reflect"
	"time"
)

func (d *decoder) text(it item) (string, bool) {
	s, ok := it.value.value.(string)
	if !ok {
		d.errorf(it.line, "%q is %s, not a string: quote it", it.key, it.value.kind)
	}
	return s, ok
}

func (d *decoder) scalar(it item, v reflect.Value) {
	switch {
	case v.Type() == durationType:
		d.duration(it, v)
	case v.Kind() == reflect.String:
		if s, ok := d.text(it); ok {
			v.SetString(s)
		}
	case v.Kind() == reflect.Bool:
		if b, ok := it.value.value.(bool); ok {
			v.SetBool(b)
		} else {
			d.errorf(it.line, "%q is %s: write true or false", it.key, it.value.kind)
		}
	case v.CanInt(), v.CanUint():
		d.integer(it, v)
	case v.CanFloat():
		d.float(it, v)
	default:
		d.errorf(it.line, "%q cannot be set here", it.key)
	}
}

func (d *decoder) duration(it item, v reflect.Value) {
	s, ok := it.value.value.(string)
	if !ok {
		d.errorf(it.line, "%q is %s: write a duration with its unit, as \"5s\"", it.key, it.value.kind)
		return
	}
	duration, err := time.ParseDuration(s)
	if err != nil {
		d.errorf(it.line, "%q: %q is no duration: write it with its unit, as \"5s\"", it.key, s)
		return
	}
	v.SetInt(int64(duration))
}

func (d *decoder) integer(it item, v reflect.Value) {
	i, ok := it.value.value.(int64)
	switch {
	case !ok:
		d.errorf(it.line, "%q is %s: write a whole number", it.key, it.value.kind)
	case v.CanInt() && !v.OverflowInt(i):
		v.SetInt(i)
	case v.CanUint() && i >= 0 && !v.OverflowUint(uint64(i)):
		v.SetUint(uint64(i))
	default:
		d.errorf(it.line, "%q is %d: out of range", it.key, i)
	}
}

func (d *decoder) float(it item, v reflect.Value) {
	switch x := it.value.value.(type) {
	case float64:
		if math.IsInf(x, 0) || math.IsNaN(x) {
			d.errorf(it.line, "%q is out of range", it.key)
			return
		}
		v.SetFloat(x)
	case int64:
		v.SetFloat(float64(x))
	default:
		d.errorf(it.line, "%q is %s: write a number", it.key, it.value.kind)
	}
}

// set stores a generic value, which fits any and, when it is a block, map[string]any.
func (d *decoder) set(it item, v reflect.Value, generic any) {
	value := reflect.ValueOf(generic)
	if !value.IsValid() {
		return
	}
	if !value.Type().AssignableTo(v.Type()) {
		d.errorf(it.line, "%q is not a block: write %s { … }", it.key, it.key)
		return
	}
	v.Set(value)
}

// anyOf is what n holds as a generic value.
func (d *decoder) anyOf(n *node) any {
	switch n.kind {
	case object:
		return d.generic(n)
	case list:
		all := make([]any, 0, len(n.list))
		for _, element := range n.list {
			all = append(all, d.anyOf(element))
		}
		return all
	}
	return n.value
}

func (d *decoder) generic(n *node) map[string]any {
	byKey := make(map[string][]item, len(n.items))
	for _, it := range n.items {
		byKey[it.key] = append(byKey[it.key], it)
	}
	m := make(map[string]any, len(byKey))
	for key, items := range byKey {
		m[key] = d.repeated(items)
	}
	return m
}

// repeated is the value of one key: of one item its value, of several blocks a list of them.
func (d *decoder) repeated(items []item) any {
	if len(items) == 1 {
		return d.anyOf(items[0].value)
	}
	var all []any
	for i, it := range items {
		if i > 0 && (it.value.kind != object || items[0].value.kind != object) {
			d.errorf(it.line, "%q is set twice, first at line %d: remove one of them", it.key, items[0].line)
		}
		all = append(all, d.anyOf(it.value))
	}
	return all
}
