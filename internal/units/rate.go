package units

import (
	"fmt"
	"strings"
)

// IOPS is a number of requests a second and a flag value.
type IOPS uint64

// String prints v with a decimal unit, exactly.
func (v IOPS) String() string { return FormatIOPS(uint64(v)) }

// Set parses text as [ParseIOPS] does.
func (v *IOPS) Set(text string) error {
	n, err := ParseIOPS(text)
	if err != nil {
		return err
	}
	*v = IOPS(n)
	return nil
}

// Type names the flag's argument in help texts.
func (*IOPS) Type() string { return "iops" }

// Bandwidth is a number of bytes a second and a flag value.
type Bandwidth uint64

// String prints v as a size a second, exactly.
func (v Bandwidth) String() string { return FormatBandwidth(uint64(v)) }

// Set parses text as [ParseBandwidth] does.
func (v *Bandwidth) Set(text string) error {
	n, err := ParseBandwidth(text)
	if err != nil {
		return err
	}
	*v = Bandwidth(n)
	return nil
}

// Type names the flag's argument in help texts.
func (*Bandwidth) Type() string { return "bandwidth" }

var countSuffixes = []suffix{{"G", 1e9}, {"M", 1e6}, {"k", 1e3}} // largest first

// ParseIOPS reads a number of requests a second: "500", "10k", "1.5M". Units are
// decimal and may be written in either case; a trailing "/s" is allowed.
func ParseIOPS(text string) (uint64, error) {
	v, err := parse(strings.TrimSuffix(text, "/s"), func(unit string) (uint64, bool) {
		if unit == "" {
			return 1, true
		}
		for _, s := range countSuffixes {
			if unit == strings.ToUpper(s.name) {
				return s.value, true
			}
		}
		return 0, false
	})
	if err != nil {
		return 0, fmt.Errorf("rate %s: %w (want requests a second, such as 10k)", quote(text), err)
	}
	return v, nil
}

// FormatIOPS prints v so that [ParseIOPS] gives the same number back.
func FormatIOPS(v uint64) string { return format(v, countSuffixes) }

// ParseBandwidth reads a number of bytes a second: a size with or without "/s",
// such as "100MiB/s".
func ParseBandwidth(text string) (uint64, error) {
	v, err := ParseSize(strings.TrimSuffix(text, "/s"))
	if err != nil {
		return 0, fmt.Errorf("bandwidth %s: %w", quote(text), err)
	}
	return v, nil
}

// FormatBandwidth prints v so that [ParseBandwidth] gives the same number back.
func FormatBandwidth(v uint64) string { return FormatSize(v) + "/s" }
