package units

import (
	"errors"
	"fmt"
	"math"
	"math/big"
	"math/bits"
	"strconv"
	"strings"
)

// SizeMax is the largest size in bytes: file offsets are signed 64-bit numbers.
const SizeMax = math.MaxInt64

// Size is a number of bytes, at most [SizeMax], and a flag value.
type Size uint64

// String prints s in the largest unit that shows it exactly in at most two
// decimals.
func (s Size) String() string { return FormatSize(uint64(s)) }

// Set parses text as [ParseSize] does.
func (s *Size) Set(text string) error {
	v, err := ParseSize(text)
	if err != nil {
		return err
	}
	*s = Size(v)
	return nil
}

// Type names the flag's argument in help texts.
func (*Size) Type() string { return "size" }

// suffix is a unit and what it multiplies by.
type suffix struct {
	name  string // as printed; read in any case
	value uint64
}

var sizeSuffixes = []suffix{ // largest first
	{"EiB", 1 << 60}, {"PiB", 1 << 50}, {"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10},
}

// ParseSize reads a number of bytes: "512", "512B", "4KiB", "4K", "1.5TiB".
// Units are binary and may be written in any case. The result is whole, not
// negative and at most [SizeMax].
func ParseSize(text string) (uint64, error) {
	v, err := parse(text, func(unit string) (uint64, bool) {
		if unit == "" || unit == "B" {
			return 1, true
		}
		for _, s := range sizeSuffixes {
			if unit == s.name[:1] || unit == strings.ToUpper(s.name) {
				return s.value, true
			}
		}
		return 0, false
	})
	if err != nil {
		return 0, fmt.Errorf("size %s: %w", quote(text), decimalHint(text, err))
	}
	return v, nil
}

// FormatSize prints bytes so that [ParseSize] gives the same number back.
func FormatSize(bytes uint64) string { return format(bytes, sizeSuffixes) }

var (
	errEmpty    = errors.New("empty")
	errNegative = errors.New("must not be negative")
	errNumber   = errors.New("not a number with a unit, such as 4KiB, 1.5GiB or 512")
	errUnit     = errors.New("unknown unit")
	errWhole    = errors.New("not a whole number")
	errLarge    = fmt.Errorf("larger than %d", int64(SizeMax))
)

// decimalHint explains why a decimal byte unit is refused.
func decimalHint(text string, err error) error {
	upper := strings.ToUpper(strings.TrimSuffix(text, "/s"))
	if !errors.Is(err, errUnit) || len(upper) < 3 || !strings.HasSuffix(upper, "B") {
		return err
	}
	for _, s := range sizeSuffixes {
		if upper[len(upper)-2:] == s.name[:1]+"B" {
			return fmt.Errorf("unit %s is read as a power of 10 by some and of 2 by others; write %s, or the number of bytes",
				s.name[:1]+"B", s.name)
		}
	}
	return err
}

const textMax = 64 // longer than any number that fits in 63 bits with a sane fraction

// quote shows text in an error, cut where it stops being helpful.
func quote(text string) string {
	if len(text) > textMax {
		return strconv.Quote(text[:textMax]) + "..."
	}
	return strconv.Quote(text)
}

// parse reads digits, an optional fraction and a unit that scale knows in upper
// case. The product must be whole and at most SizeMax.
func parse(text string, scale func(unit string) (uint64, bool)) (uint64, error) {
	switch {
	case text == "":
		return 0, errEmpty
	case len(text) > textMax:
		return 0, errNumber
	case strings.HasPrefix(text, "-"):
		return 0, errNegative
	}
	end := strings.IndexFunc(text, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
	if end < 0 {
		end = len(text)
	}
	number, unit := text[:end], text[end:]
	whole, fraction, dotted := strings.Cut(number, ".")
	if whole == "" || dotted && fraction == "" || strings.Contains(fraction, ".") {
		return 0, errNumber
	}
	factor, ok := scale(strings.ToUpper(unit))
	if !ok {
		return 0, fmt.Errorf("%w %q", errUnit, unit)
	}
	value, ok := new(big.Rat).SetString(number) // digits and one dot only, so no exponents and no fractions a/b
	if !ok {
		return 0, errNumber
	}
	value.Mul(value, new(big.Rat).SetFrac(new(big.Int).SetUint64(factor), big.NewInt(1)))
	if !value.IsInt() {
		return 0, errWhole
	}
	if !value.Num().IsInt64() {
		return 0, errLarge
	}
	return uint64(value.Num().Int64()), nil
}

// format prints v in the largest of the units that needs at most two decimals.
func format(v uint64, suffixes []suffix) string {
	for _, s := range suffixes {
		if v < s.value {
			continue
		}
		whole, rest := v/s.value, v%s.value
		if rest == 0 {
			return strconv.FormatUint(whole, 10) + s.name
		}
		high, low := bits.Mul64(rest, 100) // below 100*s.value, so the quotient fits
		if hundredths, left := bits.Div64(high, low, s.value); left == 0 {
			fraction := strings.TrimRight(fmt.Sprintf("%02d", hundredths), "0")
			return strconv.FormatUint(whole, 10) + "." + fraction + s.name
		}
	}
	return strconv.FormatUint(v, 10)
}
