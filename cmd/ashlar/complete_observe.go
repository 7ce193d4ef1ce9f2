package main

import (
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// completeObserve has --observe of c offer groups one after the other, each once; none
// stands alone.
func completeObserve(c *cobra.Command) {
	_ = c.RegisterFlagCompletionFunc("observe", func(_ *cobra.Command, _ []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
		groups := []string{"disks", "reactors", "io_uring", "nbd", "ublk", "none"}
		before, last := "", typed
		if i := strings.LastIndexByte(typed, ','); i >= 0 {
			before, last = typed[:i+1], typed[i+1:]
			groups = slices.DeleteFunc(groups, func(g string) bool {
				return g == "none" || slices.Contains(strings.Split(before, ","), g)
			})
		}
		var offered []cobra.Completion
		for _, g := range groups {
			if strings.HasPrefix(g, last) {
				offered = append(offered, before+g)
			}
		}
		return offered, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	}) // fails for an unknown flag only
}
