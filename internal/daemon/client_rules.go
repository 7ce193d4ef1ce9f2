package daemon

import (
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
)

// rulesOf are the names by which rules for clients may call what is exported.
func (x *exported) rulesOf() []string {
	rules := []string{x.volume, x.pool + "/" + x.volume}
	if x.snapshot != "" {
		rules = append(rules, x.volume+"@"+x.snapshot, x.pool+"/"+x.volume+"@"+x.snapshot)
	}
	return rules
}

// warnOfRules tells of rules for clients that nothing has the name of: mistyped, one
// leaves the volume that was meant to whoever else is let in.
func (v *volumes) warnOfRules(log *slog.Logger) {
	if len(v.clientNames) == 0 {
		return
	}
	all, err := v.names()
	if err != nil {
		log.Warn("the --tls-allow rules are not compared with the volumes", "error", err)
		return
	}
	used := map[string]bool{"": true}
	for _, x := range all {
		for _, rule := range x.rulesOf() {
			used[rule] = true
		}
	}
	for _, rule := range slices.Sorted(maps.Keys(v.clientNames)) {
		if !used[rule] {
			log.Warn(fmt.Sprintf("no volume or snapshot has the name in --tls-allow %s=%s", rule, strings.Join(v.clientNames[rule], ", ")),
				"rule", rule, "effect", "none until one is made, or its pool opened")
		}
	}
}
