package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
)

func main() {
	specFile := flag.String("spec", "", "YAML file that says what the images are")
	output := flag.String("output", "", "archive to write")
	cache := flag.String("cache", "", "directory for Debian packages, kept for the next time (default: one in the user's cache directory)")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: image --spec FILE --output ARCHIVE [--cache DIR]")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() > 0 || *specFile == "" || *output == "" {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(*specFile, *output, *cache); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(specFile, output, cache string) error {
	s, err := readSpec(specFile, os.LookupEnv)
	if err != nil {
		return err
	}
	if cache == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return fmt.Errorf("a place for Debian packages: %w; give --cache", err)
		}
		cache = filepath.Join(base, "ashlar-image")
	}
	return writeArchive(output, s, &debian{dir: cache, run: runCommand})
}
