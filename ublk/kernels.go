package ublk

import (
	"fmt"
	"strconv"
	"strings"
)

// badKernel is a range of kernels whose driver must not be used.
type badKernel struct {
	version  string // the digits and dots that the release begins with
	from, to int    // build number after the '-'; both 0: every build of the version
	flavour  string // what the release ends with; "" for any
	reason   string
	sources  []string
}

const reasonQueueOrder = "ADD_DEV dereferences NULL in ublk_init_queues and never returns: " +
	"529d4d632788 (NUMA-aware allocation) without 011af85ccd87 (tag set before queues)"

// badKernels is data: an entry needs a source that saw the kernel fail.
var badKernels = []badKernel{
	{version: "6.18.4", reason: reasonQueueOrder, sources: []string{
		"https://github.com/zabbly/linux/issues/52", "https://github.com/kvcache-ai/AgentENV/issues/20"}},
	{version: "6.18.5", reason: reasonQueueOrder, sources: []string{
		"https://github.com/kvcache-ai/AgentENV/issues/20 (6.18.6 has the fix)"}},
	{version: "6.17.0", from: 1015, to: 1018, flavour: "azure", reason: reasonQueueOrder, sources: []string{
		"https://github.com/actions/runner-images/issues/14175", "https://bugs.launchpad.net/bugs/2154635"}},
	{version: "6.17.0", from: 1015, to: 1018, flavour: "aws", reason: reasonQueueOrder, sources: []string{
		"https://github.com/longhorn/longhorn/issues/13509 (6.17.0-1017-aws)"}},
}

// KernelError says that the running kernel is known to break on ublk.
type KernelError struct {
	Release string // as uname says
	Reason  string
	Sources []string
}

// Error implements error.
func (e *KernelError) Error() string {
	return fmt.Sprintf("ublk: not used on Linux %s: %s (%s)", e.Release, e.Reason, strings.Join(e.Sources, ", "))
}

// checkKernel returns a *KernelError for a release on the list.
func checkKernel(release string) error {
	_, rest, _ := strings.Cut(release, "-")
	version := release
	if i := strings.IndexFunc(release, func(r rune) bool { return r != '.' && (r < '0' || r > '9') }); i >= 0 {
		version = release[:i] // Debian's goes on with +deb13
	}
	digits := rest
	if i := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		digits = rest[:i]
	}
	build, _ := strconv.Atoi(digits) // none: 0, which no range holds
	for i := range badKernels {
		k := &badKernels[i]
		if k.version != version || (k.to != 0 && (build < k.from || build > k.to)) || !strings.HasSuffix(release, k.flavour) {
			continue
		}
		return &KernelError{Release: release, Reason: k.reason, Sources: k.sources}
	}
	return nil
}
