package doctor

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// notDisks are block devices that are no disks of their own: what Ashlar or another
// makes of files, memory and networks.
var notDisks = []string{"loop", "ram", "zram", "nbd", "ublkb", "fd", "sr", "rbd", "drbd"}

const (
	blockMax       = 4096      // a larger logical block cannot hold a pool's
	signatureBytes = 128 << 10 // of a disk's beginning are looked at
)

// disk is what the kernel says of one.
type disk struct {
	name, dir string
	size      uint64
	parts     []string // partitions: their directories
}

func (h *Host) disks() []disk {
	var disks []disk
	for _, entry := range h.list("/sys/block") {
		name := entry.Name()
		if slices.ContainsFunc(notDisks, func(prefix string) bool { return strings.HasPrefix(name, prefix) }) {
			continue
		}
		d := disk{name: name, dir: "/sys/block/" + name}
		sectors, _ := h.number(d.dir + "/size")
		if d.size = sectors * 512; d.size == 0 {
			continue // no medium
		}
		for _, part := range h.list(d.dir) {
			if h.exists(d.dir + "/" + part.Name() + "/partition") {
				d.parts = append(d.parts, d.dir+"/"+part.Name())
			}
		}
		disks = append(disks, d)
	}
	return disks
}

func checkDisks(h *Host, _ *Options) []Finding {
	disks := h.disks()
	if len(disks) == 0 {
		return []Finding{note("no disks were found in /sys/block: a pool can be in files", "")}
	}
	var findings []Finding
	for i := range disks {
		findings = append(findings, h.checkDisk(&disks[i])...)
	}
	return findings
}

func (h *Host) checkDisk(d *disk) []Finding {
	queue := d.dir + "/queue/"
	logical, _ := h.number(queue + "logical_block_size")
	physical, _ := h.number(queue + "physical_block_size")
	rotational := h.text(queue+"rotational") == "1"
	volatile := h.text(queue+"write_cache") == "write back"
	scheduler := chosen(h.text(queue + "scheduler"))
	discard, _ := h.number(queue + "discard_max_bytes")

	kind := "no spindle"
	if rotational {
		kind = "rotating"
	}
	cache := "no volatile write cache"
	switch {
	case volatile && h.text(queue+"fua") == "1":
		cache = "a volatile write cache with FUA"
	case volatile:
		cache = "a volatile write cache without FUA"
	case h.text(queue+"write_cache") == "":
		cache = "a write cache of unknown kind"
	}
	text := fmt.Sprintf("%s: %s, %s, blocks of %d and %d bytes, %s, scheduler %s", d.name, sizeOf(d.size), kind, logical, physical, cache, scheduler)
	var findings []Finding
	use := h.use(d)
	if use != "" {
		findings = append(findings, ok(text+"; "+use))
	} else {
		findings = append(findings, h.free(d, text))
	}
	if logical > blockMax {
		findings = append(findings, warning(fmt.Sprintf("%s has blocks of %d bytes, more than the %d a pool writes", d.name, logical, blockMax), "use another disk, or format it anew with blocks of 4096 bytes (nvme format)"))
	}
	if volatile {
		findings = append(findings, note(d.name+" has a volatile write cache: every flush of a client waits for the medium", "a disk with power-loss protection makes fsync fast"))
	}
	if !rotational && scheduler != "none" && scheduler != "" {
		findings = append(findings, note(fmt.Sprintf("%s has the I/O scheduler %s, which costs a disk without a spindle time", d.name, scheduler), fmt.Sprintf("echo none > /sys/block/%s/queue/scheduler", d.name)))
	}
	if rotational {
		findings = append(findings, note(d.name+" says that it rotates: if so, every write outside the page cache, and every flush of a pool's journal, costs a turn", "use a disk without a spindle for what is to be fast"))
	}
	if discard == 0 && !rotational {
		findings = append(findings, note(d.name+" takes no discards: space given back by clients stays used on the disk", ""))
	}
	return findings
}

// chosen is the word in brackets: mq-deadline [none].
func chosen(text string) string {
	if _, rest, found := strings.Cut(text, "["); found {
		word, _, _ := strings.Cut(rest, "]")
		return word
	}
	return text
}

// use says what a disk is used for now; "" when nothing was found.
func (h *Host) use(d *disk) string {
	mounts, swaps := h.mounts(), h.text("/proc/swaps")
	for _, dir := range append([]string{d.dir}, d.parts...) {
		name := path.Base(dir)
		if at := mounts[h.text(dir+"/dev")]; at != "" {
			return fmt.Sprintf("%s is mounted at %s", name, at)
		}
		if at := mounts["/dev/"+name]; at != "" { // Btrfs has device numbers of its own
			return fmt.Sprintf("%s is mounted at %s", name, at)
		}
		if strings.Contains(swaps+" ", "/dev/"+name+" ") || strings.Contains(swaps, "/dev/"+name+"\t") {
			return name + " is swap space"
		}
		for _, holder := range h.list(dir + "/holders") {
			return fmt.Sprintf("%s is part of %s", name, holder.Name())
		}
	}
	return ""
}

// mounts are where file systems are mounted, by device number and by source.
func (h *Host) mounts() map[string]string {
	at := map[string]string{}
	for line := range strings.Lines(h.text("/proc/self/mountinfo")) {
		f := strings.Fields(line)
		separator := slices.Index(f, "-")
		if len(f) < 6 || separator < 0 || separator+2 >= len(f) {
			continue
		}
		for _, key := range []string{f[2], f[separator+2]} {
			if _, known := at[key]; !known {
				at[key] = unescape(f[4])
			}
		}
	}
	return at
}

// unescape reads a path of mountinfo, where \040 is a space.
func unescape(path string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(path)
}

// free is the finding of a disk that nobody uses now: what is on it is another matter.
func (h *Host) free(d *disk, text string) Finding {
	if len(d.parts) > 0 {
		return ok(fmt.Sprintf("%s; it has %d partitions, none in use", text, len(d.parts)))
	}
	var b [signatureBytes]byte
	err := h.ReadDisk("/dev/"+d.name, b[:])
	if err == nil {
		if what := h.Foreign(b[:]); what != "" {
			return ok(text + "; it holds " + what)
		}
		return ok(fmt.Sprintf("%s; it is empty: ashlar pool create NAME /dev/%s", text, d.name))
	}
	// Who may not read disks may know what udev found there.
	for line := range strings.Lines(h.text("/run/udev/data/b" + h.text(d.dir+"/dev"))) {
		for _, key := range []string{"E:ID_FS_TYPE=", "E:ID_PART_TABLE_TYPE="} {
			if what, found := strings.CutPrefix(strings.TrimSpace(line), key); found {
				return ok(text + "; it holds " + what)
			}
		}
	}
	return unseen(text+"; what is on it", err)
}
