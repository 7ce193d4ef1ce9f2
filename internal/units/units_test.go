package units

import (
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

var (
	_ pflag.Value = (*Size)(nil)
	_ pflag.Value = (*IOPS)(nil)
	_ pflag.Value = (*Bandwidth)(nil)
	_ pflag.Value = (*CPUs)(nil)
)

func TestParseSize(t *testing.T) {
	for _, tt := range []struct {
		text string
		want uint64
	}{
		{"0", 0}, {"512", 512}, {"512B", 512}, {"512b", 512}, {"007", 7},
		{"4KiB", 4096}, {"4kib", 4096}, {"4K", 4096}, {"4k", 4096},
		{"1M", 1 << 20}, {"1g", 1 << 30}, {"1GiB", 1 << 30}, {"2T", 2 << 40}, {"1P", 1 << 50}, {"7EiB", 7 << 60},
		{"1.5TiB", 3 << 39}, {"0.5KiB", 512}, {"1.50G", 3 << 29}, {"1.0", 1},
		{"9223372036854775807", math.MaxInt64},
		{"0.0009765625KiB", 1},
	} {
		got, err := ParseSize(tt.text)
		if err != nil || got != tt.want {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", tt.text, got, err, tt.want)
		}
	}
}

func TestParseSizeRefuses(t *testing.T) {
	for _, tt := range []struct{ text, reason string }{
		{"", "empty"},
		{"-1", "negative"}, {"-4KiB", "negative"},
		{"KiB", "not a number"}, {".5K", "not a number"}, {"5.K", "not a number"}, {"1.2.3", "not a number"}, {"abc", "not a number"},
		{"+1", "not a number"}, {" 1", "not a number"},
		{"1 K", "unknown unit"}, {"1KK", "unknown unit"}, {"1e5", "unknown unit"}, {"0x10", "unknown unit"}, {"1_000", "unknown unit"},
		{"4Ki", "unknown unit"}, {"1\x00", "unknown unit"},
		{"4KB", "write KiB"}, {"1gb", "write GiB"},
		{"0.5", "whole"}, {"1.3KiB", "whole"},
		{"9223372036854775808", "larger"}, {"8EiB", "larger"}, {"99999999999999999999999", "larger"},
		{strings.Repeat("9", 1000), "not a number"},
	} {
		got, err := ParseSize(tt.text)
		if err == nil {
			t.Errorf("ParseSize(%q) = %d, want an error", tt.text, got)
			continue
		}
		if !strings.Contains(err.Error(), tt.reason) {
			t.Errorf("ParseSize(%q): error %q does not say %q", tt.text, err, tt.reason)
		}
	}
}

func TestFormatSize(t *testing.T) {
	for _, tt := range []struct {
		bytes uint64
		want  string
	}{
		{0, "0"}, {1, "1"}, {512, "512"}, {1023, "1023"}, {1024, "1KiB"}, {1025, "1025"}, {1280, "1.25KiB"}, {1536, "1.5KiB"},
		{4096, "4KiB"}, {1 << 30, "1GiB"}, {3 << 39, "1.5TiB"}, {1<<30 + 4096, "1048580KiB"}, {7 << 60, "7EiB"},
		{math.MaxInt64, "9223372036854775807"}, {math.MaxUint64, "18446744073709551615"}, {1<<63 + 1<<58, "8.25EiB"},
	} {
		if got := FormatSize(tt.bytes); got != tt.want {
			t.Errorf("FormatSize(%d) = %q, want %q", tt.bytes, got, tt.want)
		}
	}
}

func TestRates(t *testing.T) {
	for _, tt := range []struct {
		parse  func(string) (uint64, error)
		format func(uint64) string
		text   string
		want   uint64
		back   string
	}{
		{ParseIOPS, FormatIOPS, "500", 500, "500"},
		{ParseIOPS, FormatIOPS, "10k", 10_000, "10k"},
		{ParseIOPS, FormatIOPS, "10K/s", 10_000, "10k"},
		{ParseIOPS, FormatIOPS, "1.5M", 1_500_000, "1.5M"},
		{ParseIOPS, FormatIOPS, "1001", 1001, "1001"},
		{ParseIOPS, FormatIOPS, "12.34k", 12_340, "12.34k"},
		{ParseBandwidth, FormatBandwidth, "100MiB/s", 100 << 20, "100MiB/s"},
		{ParseBandwidth, FormatBandwidth, "100M", 100 << 20, "100MiB/s"},
	} {
		got, err := tt.parse(tt.text)
		if err != nil || got != tt.want {
			t.Errorf("parse %q = %d, %v; want %d", tt.text, got, err, tt.want)
		}
		if back := tt.format(tt.want); back != tt.back {
			t.Errorf("format %d = %q, want %q", tt.want, back, tt.back)
		}
	}
	for _, text := range []string{"", "-1", "10q", "10KiB", "0.5", "/s", "1/s/s", "99999999999G"} {
		if got, err := ParseIOPS(text); err == nil {
			t.Errorf("ParseIOPS(%q) = %d, want an error", text, got)
		}
	}
	for _, text := range []string{"", "-1", "10MB/s", "MiB/s", "1M/h"} {
		if got, err := ParseBandwidth(text); err == nil {
			t.Errorf("ParseBandwidth(%q) = %d, want an error", text, got)
		}
	}
}

func TestCPUs(t *testing.T) {
	for _, tt := range []struct {
		text string
		want []int
		back string
	}{
		{"", nil, ""},
		{"0", []int{0}, "0"},
		{"0,2-3", []int{0, 2, 3}, "0,2-3"},
		{"3,1", []int{3, 1}, "3,1"},
		{"4-4", []int{4}, "4"},
		{"0,1,2,8", []int{0, 1, 2, 8}, "0-2,8"},
		{"1023", []int{1023}, "1023"},
	} {
		got, err := ParseCPUs(tt.text)
		if err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("ParseCPUs(%q) = %v, %v; want %v", tt.text, got, err, tt.want)
		}
		if back := FormatCPUs(got); back != tt.back {
			t.Errorf("FormatCPUs(%v) = %q, want %q", got, back, tt.back)
		}
	}
	for _, tt := range []struct{ text, reason string }{
		{",", "not a CPU"}, {"0,", "not a CPU"}, {"a", "not a CPU"}, {"-1", "not a CPU"}, {"1-", "not a CPU"}, {"1-2-3", "not a CPU"},
		{"0 ,1", "not a CPU"}, {"3-1", "backwards"}, {"1,1", "twice"}, {"0-3,2", "twice"}, {"1024", "above"},
		{"99999999999999999999", "above"}, {"0-4294967295", "above"},
	} {
		got, err := ParseCPUs(tt.text)
		if err == nil {
			t.Errorf("ParseCPUs(%q) = %v, want an error", tt.text, got)
		} else if !strings.Contains(err.Error(), tt.reason) {
			t.Errorf("ParseCPUs(%q): error %q does not say %q", tt.text, err, tt.reason)
		}
	}
}

func TestFlagValuesSetAndPrint(t *testing.T) {
	var size Size
	var iops IOPS
	var bandwidth Bandwidth
	var cpus CPUs
	flags := pflag.NewFlagSet("test", pflag.ContinueOnError)
	flags.Var(&size, "size", "")
	flags.Var(&iops, "iops", "")
	flags.Var(&bandwidth, "bandwidth", "")
	flags.Var(&cpus, "cpus", "")
	if err := flags.Parse([]string{"--size=1.5G", "--iops=20k", "--bandwidth=1M/s", "--cpus=0,2-3"}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"size": "1.5GiB", "iops": "20k", "bandwidth": "1MiB/s", "cpus": "0,2-3"} {
		if got := flags.Lookup(name).Value.String(); got != want {
			t.Errorf("--%s prints %q, want %q", name, got, want)
		}
	}
	for _, arg := range []string{"--size=x", "--iops=x", "--bandwidth=x", "--cpus=x"} {
		if err := flags.Parse([]string{arg}); err == nil {
			t.Errorf("%s is accepted", arg)
		}
	}
	if size != 3<<29 {
		t.Errorf("a refused value changed the flag to %d", size)
	}
}

func FuzzUnits(f *testing.F) {
	for _, text := range []string{"", "512", "4KiB", "1.5TiB", "10k", "100MiB/s", "0,2-3", "8EiB", "-1", "0.0009765625KiB", "1GB"} {
		f.Add(text, uint64(len(text)))
	}
	f.Add("", uint64(math.MaxInt64))
	f.Fuzz(func(t *testing.T, text string, v uint64) {
		if got, err := ParseSize(text); err == nil && got > SizeMax {
			t.Errorf("ParseSize(%q) = %d, above the maximum", text, got)
		}
		if cpus, err := ParseCPUs(text); err == nil {
			again, err := ParseCPUs(FormatCPUs(cpus))
			if err != nil || !slices.Equal(again, cpus) {
				t.Errorf("ParseCPUs(%q) = %v does not survive printing: %v, %v", text, cpus, again, err)
			}
		}
		v &= SizeMax
		for name, back := range map[string]func() (uint64, error){
			"size":      func() (uint64, error) { return ParseSize(FormatSize(v)) },
			"iops":      func() (uint64, error) { return ParseIOPS(FormatIOPS(v)) },
			"bandwidth": func() (uint64, error) { return ParseBandwidth(FormatBandwidth(v)) },
		} {
			if got, err := back(); err != nil || got != v {
				t.Errorf("%s %d reads back as %d, %v", name, v, got, err)
			}
		}
	})
}
