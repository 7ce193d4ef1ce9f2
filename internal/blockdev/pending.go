package blockdev

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Pending is what a device has that is not done. With a device that is taken away it is
// lost: requests end with an error.
type Pending struct {
	Requests int      // that its driver has, sent or not
	Dirty    uint64   // bytes written through the node that are in the page cache only
	Writers  []string // programs that have it open for writing, and so may have more to come: "dd (process 7)"
}

// None says whether nothing is lost.
func (p *Pending) None() bool { return p.Requests == 0 && p.Dirty == 0 && len(p.Writers) == 0 }

// String says in words what is lost; "" for nothing.
func (p *Pending) String() string {
	var words []string
	switch {
	case p.Requests == 1:
		words = append(words, "one request waits")
	case p.Requests > 1:
		words = append(words, fmt.Sprintf("%d requests wait", p.Requests))
	}
	if p.Dirty > 0 {
		words = append(words, fmt.Sprintf("%d KiB are written and not synced", (p.Dirty+1023)/1024))
	}
	if len(p.Writers) > 0 {
		words = append(words, "it is open for writing in "+strings.Join(p.Writers, ", "))
	}
	return strings.Join(words, ", ")
}

// Pending tells what a device has that is not done. The counts of waiting requests and
// of the page cache come from debugfs; without that, requests that the driver has not
// been given yet, and what nobody has open, go unseen.
func (h Host) Pending(name string) Pending {
	var p Pending
	for _, n := range strings.Fields(h.Text(name, "inflight")) { // reads, writes
		count, _ := strconv.Atoi(n) // the kernel's own number
		p.Requests += count
	}
	// A request has a tag from when it is made until it ends, also while it waits to be
	// sent again; a scheduler has tags of its own for those it holds.
	tables, _ := filepath.Glob(filepath.Join(h.Sys, "kernel/debug/block", name, "hctx*", "*tags")) // the pattern is good
	held, scheduled := 0, 0
	for _, path := range tables {
		if filepath.Base(path) == "sched_tags" {
			scheduled += busy(text(path))
		} else {
			held += busy(text(path))
		}
	}
	p.Requests = max(p.Requests, held, scheduled)
	number := h.Text(name, "dev")
	for line := range strings.Lines(text(filepath.Join(h.Sys, "kernel/debug/bdi", number, "stats"))) {
		if fields := strings.Fields(line); number != "" && len(fields) >= 2 && slices.Contains([]string{"BdiWriteback:", "BdiReclaimable:"}, fields[0]) {
			n, _ := strconv.ParseUint(fields[1], 10, 64) // as above
			p.Dirty += n << 10
		}
	}
	p.Writers = h.writers(name)
	return p
}

// busy is how many tags a table of debugfs says are taken.
func busy(table string) (n int) {
	for line := range strings.Lines(table) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), "busy="); ok {
			count, _ := strconv.Atoi(value) // the kernel's own number
			n += count
		}
	}
	return n
}

// writers are the programs that have a device or a partition of it open for writing, but
// this one.
func (h Host) writers(name string) (list []string) {
	_, nodes, _ := h.parts(name)
	own := strconv.Itoa(os.Getpid())
	links, _ := filepath.Glob(filepath.Join(h.Proc, "[0-9]*", "fd", "*")) // as above
	for _, link := range links {
		to, err := os.Readlink(link)
		if err != nil || !slices.Contains(nodes, to) {
			continue
		}
		dir := filepath.Dir(filepath.Dir(link))
		if !writes(text(filepath.Join(dir, "fdinfo", filepath.Base(link)))) {
			continue
		}
		pid := filepath.Base(dir)
		if who := fmt.Sprintf("%s (process %s)", text(filepath.Join(dir, "comm")), pid); pid != own && !slices.Contains(list, who) {
			list = append(list, who)
		}
	}
	return list
}

// writes tells from what the kernel says of a descriptor (proc_pid_fdinfo(5)) whether it
// can be written to. One of O_PATH has its file not open at all.
func writes(info string) bool {
	for line := range strings.Lines(info) {
		if value, ok := strings.CutPrefix(line, "flags:"); ok {
			flags, err := strconv.ParseUint(strings.TrimSpace(value), 8, 64)
			const path = 0o10000000 // O_PATH, asm-generic/fcntl.h
			return err == nil && flags&path == 0 && flags&3 != 0
		}
	}
	return false
}

// UsersElsewhere are the mounts of a device in the mount namespaces of other processes,
// each with one of these.
func (h Host) UsersElsewhere(name string) (where []string) {
	numbers, nodes, _ := h.parts(name)
	seen := map[string]bool{}
	if own, err := os.Readlink(filepath.Join(h.Proc, "self/ns/mnt")); err == nil {
		seen[own] = true
	}
	tables, _ := filepath.Glob(filepath.Join(h.Proc, "[0-9]*", "mountinfo")) // as above
	for _, table := range tables {
		dir := filepath.Dir(table)
		namespace, err := os.Readlink(filepath.Join(dir, "ns/mnt"))
		if err != nil || seen[namespace] {
			continue
		}
		seen[namespace] = true
		for line := range strings.Lines(text(table)) {
			if place, ok := mountOf(line, numbers, nodes); ok {
				where = append(where, fmt.Sprintf("%s (of process %s)", place, filepath.Base(dir)))
			}
		}
	}
	return where
}
