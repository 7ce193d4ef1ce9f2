package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/spf13/pflag"
)

// configMax bounds a configuration file: all flags with long lists take a few KiB.
const configMax = 1 << 20

// readConfig sets flags from a YAML file: a mapping from their names to a value, or
// a list of values where a flag may be repeated. Flags of the command line stay.
// The reserved ones are not for the file.
//
// Errors name the file and the line; they are errors of usage.
func readConfig(flags *pflag.FlagSet, path string, reserved ...string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("--config: %w", err)
	}
	if info.Size() > configMax {
		return usagef("--config %s: larger than %d bytes", path, configMax)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("--config: %w", err)
	}
	at := func(node ast.Node, format string, args ...any) error {
		return usagef("%s:%d: %s", path, node.GetToken().Position.Line, fmt.Sprintf(format, args...))
	}
	file, err := parser.ParseBytes(text, 0)
	if err != nil {
		var syntax yaml.Error
		if errors.As(err, &syntax) && syntax.GetToken() != nil {
			return usagef("%s:%d: %s", path, syntax.GetToken().Position.Line, syntax.GetMessage())
		}
		return usagef("%s: %v", path, err)
	}
	typed := map[string]bool{} // on the command line
	flags.Visit(func(flag *pflag.Flag) { typed[flag.Name] = true })
	seen := map[string]int{}
	for i, document := range file.Docs {
		entries, err := configEntries(document.Body)
		if err != nil {
			return at(document.Body, "%v", err)
		}
		if i > 0 && len(entries) > 0 {
			return at(document.Body, "a second document: all options are in one")
		}
		for _, entry := range entries {
			name, err := configScalar(entry.Key)
			if err != nil {
				return at(entry.Key, "a key: %v", err)
			}
			flag := flags.Lookup(name)
			switch {
			case flag == nil:
				return at(entry.Key, "unknown option %q%s", name, closest(flags, name))
			case slices.Contains(reserved, name):
				return at(entry.Key, "%q is for the command line only", name)
			case seen[name] > 0:
				return at(entry.Key, "%q is set already on line %d", name, seen[name])
			}
			seen[name] = entry.Key.GetToken().Position.Line
			values, isList, err := configValues(entry.Value)
			if err != nil {
				return at(entry.Key, "%s: %v", name, err)
			}
			list, takesList := flag.Value.(pflag.SliceValue)
			if isList && !takesList {
				return at(entry.Key, "%s: takes one value, not a list", name)
			}
			if typed[name] {
				continue
			}
			if takesList {
				err = list.Replace(values)
				flag.Changed = true
			} else {
				err = flags.Set(name, values[0])
			}
			if err != nil {
				return at(entry.Value, "%s %q: %v", name, strings.Join(values, ", "), cause(err))
			}
		}
	}
	return nil
}

// cause takes pflag's repetition of the flag and the value off an error.
func cause(err error) error {
	if inner := errors.Unwrap(err); inner != nil {
		return inner
	}
	return err
}

// configEntries are the entries of a mapping; an empty document has none.
func configEntries(node ast.Node) ([]*ast.MappingValueNode, error) {
	switch n := node.(type) {
	case nil, *ast.NullNode, *ast.CommentGroupNode:
		return nil, nil
	case *ast.MappingNode:
		return n.Values, nil
	case *ast.MappingValueNode:
		return []*ast.MappingValueNode{n}, nil
	}
	return nil, errors.New("options are written NAME: VALUE")
}

// configScalar is the text of one value, as a flag would be given it.
func configScalar(node ast.Node) (string, error) {
	switch n := node.(type) {
	case *ast.StringNode:
		return n.Value, nil
	case *ast.LiteralNode:
		return strings.TrimSuffix(n.Value.Value, "\n"), nil
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode:
		return n.GetToken().Value, nil // as it was written: 0.10 stays 0.10
	case *ast.NullNode:
		return "", errors.New("has no value")
	case *ast.MappingNode, *ast.MappingValueNode:
		return "", errors.New("takes a value, not options of its own")
	}
	return "", fmt.Errorf("a YAML %s is not understood here", strings.ToLower(node.Type().String()))
}

// configValues are the values of one option.
func configValues(node ast.Node) (values []string, isList bool, err error) {
	list, ok := node.(*ast.SequenceNode)
	if !ok {
		value, err := configScalar(node)
		return []string{value}, false, err
	}
	values = []string{}
	for _, item := range list.Values {
		value, err := configScalar(item)
		if err != nil {
			return nil, true, err
		}
		values = append(values, value)
	}
	return values, true, nil
}

// closest suggests the option someone meant.
func closest(flags *pflag.FlagSet, name string) string {
	plain := func(s string) string { return strings.ToLower(strings.NewReplacer("-", "", "_", "").Replace(s)) }
	suggestion := ""
	flags.VisitAll(func(flag *pflag.Flag) {
		if plain(flag.Name) == plain(name) {
			suggestion = fmt.Sprintf(" (it is %q)", flag.Name)
		}
	})
	return suggestion
}
