package main

import (
	"encoding/json"
	"fmt"
	"runtime"

	"github.com/spf13/cobra"
)

func newVersionCommand() *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		Example: "  ashlar version --output json",
		Args:    noArguments,
		RunE: func(c *cobra.Command, _ []string) error {
			switch output {
			case "table":
				_, err := fmt.Fprintf(c.OutOrStdout(), "ashlar %s\n", versionText())
				return err
			case "json":
				return json.NewEncoder(c.OutOrStdout()).Encode(map[string]string{
					"version": version, "commit": commit, "go": runtime.Version(), "os": runtime.GOOS, "arch": runtime.GOARCH,
				})
			}
			return usagef("--output %q: must be table or json", output)
		},
	}
	addOutputFlag(c, &output)
	return c
}

// addOutputFlag adds --output with its completion.
func addOutputFlag(c *cobra.Command, value *string) {
	c.Flags().StringVarP(value, "output", "o", "table", "form of the result: table or json")
	completeWords(c, "output", "table", "json")
}

// completeWords has the shell offer words for a flag.
func completeWords(c *cobra.Command, flag string, words ...string) {
	_ = c.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)) // fails for an unknown flag only
}
