package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/charmbracelet/x/ansi"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/ashlar-storage/ashlar/internal/units"
)

// ---- JSON -----------------------------------------------------------------------

// object is a JSON object that keeps the order of its fields.
type object []member

type member struct {
	name  string
	value any
}

// MarshalJSON implements json.Marshaler.
func (o object) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(strconv.Quote(m.name)) // names are plain ASCII
		b.WriteByte(':')
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(false) // as writeJSON
		if err := e.Encode(m.value); err != nil {
			return nil, err
		}
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// objectOf is a message as --output json shows it. protojson is not used: it
// prints 64-bit numbers as strings, enums in capitals with a prefix, and is not
// stable from one build to the next by design.
func objectOf(m proto.Message) object { return objectOfMessage(m.ProtoReflect()) }

// itemsOf is a list of messages as --output json shows it.
func itemsOf[M proto.Message](items []M) object { return object{{"items", objectsOf(items)}} }

func objectsOf[M proto.Message](items []M) []object {
	list := make([]object, 0, len(items)) // never null
	for _, m := range items {
		list = append(list, objectOf(m))
	}
	return list
}

func objectOfMessage(m protoreflect.Message) object {
	o := object{}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		o = append(o, member{string(f.Name()), fieldOf(m, f)})
	}
	return o
}

func fieldOf(m protoreflect.Message, f protoreflect.FieldDescriptor) any {
	switch {
	case f.IsMap():
		all := make(map[string]any)
		m.Get(f).Map().Range(func(key protoreflect.MapKey, v protoreflect.Value) bool {
			all[key.String()] = valueOf(v, f.MapValue())
			return true
		})
		return all
	case f.IsList():
		list := make([]any, 0)
		for i := range m.Get(f).List().Len() {
			list = append(list, valueOf(m.Get(f).List().Get(i), f))
		}
		return list
	case f.Kind() == protoreflect.MessageKind && !m.Has(f):
		return nil
	}
	return valueOf(m.Get(f), f)
}

func valueOf(v protoreflect.Value, f protoreflect.FieldDescriptor) any {
	switch f.Kind() {
	case protoreflect.EnumKind:
		return wordOf(f.Enum(), v.Enum())
	case protoreflect.MessageKind:
		switch m := v.Message().Interface().(type) {
		case *timestamppb.Timestamp:
			return m.AsTime().UTC().Format(time.RFC3339Nano)
		case *durationpb.Duration:
			return m.AsDuration().Seconds()
		}
		return objectOfMessage(v.Message())
	}
	return v.Interface()
}

// word is an enum as people and JSON see it: POOL_STATE_READ_ONLY is read-only.
func word(e protoreflect.Enum) string { return wordOf(e.Descriptor(), e.Number()) }

func wordOf(d protoreflect.EnumDescriptor, number protoreflect.EnumNumber) string {
	value := d.Values().ByNumber(number)
	if value == nil { // of a daemon that is newer
		return strconv.Itoa(int(number))
	}
	prefix := strings.TrimSuffix(string(d.Values().Get(0).Name()), "UNSPECIFIED")
	return strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(string(value.Name()), prefix), "_", "-"))
}

func writeJSON(out io.Writer, v any) error {
	e := json.NewEncoder(out)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// writeJSONLine writes one object on one line.
func writeJSONLine(out io.Writer, m proto.Message) error {
	e := json.NewEncoder(out)
	e.SetEscapeHTML(false)
	return e.Encode(objectOf(m))
}

// ---- tables ---------------------------------------------------------------------

// table prints rows in columns. A head that begins with > is a column of numbers,
// aligned to the right.
type table struct {
	right []bool
	rows  [][]string
}

func newTable(head ...string) *table {
	t := &table{}
	names := slices.Clone(head)
	for i, h := range head {
		name, right := strings.CutPrefix(h, ">")
		names[i] = name
		t.right = append(t.right, right)
	}
	t.add(names...)
	return t
}

func (t *table) add(cells ...string) {
	row := slices.Clone(cells)
	for i := range row {
		if row[i] == "" {
			row[i] = "-"
		}
	}
	t.rows = append(t.rows, row)
}

func (t *table) write(out io.Writer) error {
	widths := make([]int, len(t.right))
	for _, row := range t.rows {
		for i, cell := range row {
			widths[i] = max(widths[i], ansi.StringWidth(cell))
		}
	}
	var b strings.Builder
	for _, row := range t.rows {
		var line strings.Builder
		for i, cell := range row {
			space := strings.Repeat(" ", widths[i]-ansi.StringWidth(cell))
			if i > 0 {
				line.WriteString("  ")
			}
			if t.right[i] {
				line.WriteString(space + cell)
			} else {
				line.WriteString(cell + space)
			}
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// facts prints what is known of one thing, a line each.
type facts struct{ rows [][2]string }

func (f *facts) add(name, format string, args ...any) {
	f.rows = append(f.rows, [2]string{name, fmt.Sprintf(format, args...)})
}

func (f *facts) write(out io.Writer) error {
	width := 0
	for _, r := range f.rows {
		width = max(width, ansi.StringWidth(r[0]))
	}
	var b strings.Builder
	for _, r := range f.rows {
		fmt.Fprintf(&b, "%s%s  %s\n", r[0], strings.Repeat(" ", width-ansi.StringWidth(r[0])), r[1])
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// ---- words and numbers ----------------------------------------------------------

// humane prints a size as people read it: in the largest unit below it, to one
// decimal, downwards, so that what is free is never said to be more.
func humane(bytes uint64) string {
	unit := uint64(1)
	for unit < 1<<60 && bytes/unit >= 1<<10 {
		unit <<= 10
	}
	if unit == 1 {
		return strconv.FormatUint(bytes, 10) + "B"
	}
	if bytes%unit == 0 {
		return units.FormatSize(bytes)
	}
	name := strings.TrimPrefix(units.FormatSize(unit), "1")
	return fmt.Sprintf("%d.%d%s", bytes/unit, bytes%unit*10/unit, name) // below 10 * 2^60, so it fits
}

// percent is part in percent of whole, or "".
func percent(part, whole uint64) string {
	if whole == 0 {
		return ""
	}
	return fmt.Sprintf("%.0f %%", float64(part)/float64(whole)*100)
}

// when is a time as tables show it, in the local zone.
func when(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return t.AsTime().Local().Format(time.DateTime)
}

func count[N uint32 | uint64](n N) string { return strconv.FormatUint(uint64(n), 10) }

// labelList is labels in the order of their keys.
func labelList(m map[string]string) string {
	var list []string
	for k, v := range m {
		list = append(list, k+"="+v)
	}
	slices.Sort(list)
	return strings.Join(list, " ")
}
