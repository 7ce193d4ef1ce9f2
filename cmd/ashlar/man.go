package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

func newManCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use:     "man",
		Short:   "Write the manual pages",
		Example: "  ashlar man --dir docs/man",
		Args:    noArguments,
		Hidden:  true,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
			root := c.Root()
			root.Version = "" // pages that change with every commit could not be compared
			epoch := time.Unix(0, 0)
			if err := doc.GenManTree(root, &doc.GenManHeader{Title: "ASHLAR", Section: "1", Source: "Ashlar", Manual: "Ashlar manual", Date: &epoch}, dir); err != nil {
				return fmt.Errorf("manual pages: %w", err)
			}
			return nil
		},
	}
	c.Flags().StringVar(&dir, "dir", "docs/man", "directory to write to")
	_ = c.MarkFlagDirname("dir") // fails for an unknown flag only
	return c
}
