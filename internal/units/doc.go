// Package units reads and writes the quantities people type: sizes ("4KiB",
// "1.5TiB"), rates ("10k" requests a second, "100MiB/s") and CPU lists
// ("0,2-3"). Flags, configuration files and reports all use it, so that a word
// means the same number everywhere.
//
// Each kind has a type that is a flag value (Set, String, Type, as
// github.com/spf13/pflag wants) and a Parse function for other uses.
//
// What String prints, Parse reads back as the same number: an option in force
// can be written beside the data it made and compared later. Sizes are binary:
// "4K" and "4KiB" are 4096, as fio and qemu read them. "4KB" is refused,
// because half of the readers would take it for 4000. Counts ("10k" requests)
// are decimal.
package units
