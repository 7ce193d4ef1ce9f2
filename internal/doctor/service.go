package doctor

import (
	"errors"
	"fmt"
	"net"
	"path"
	"slices"
	"strings"
	"syscall"
)

func checkPorts(h *Host, o *Options) []Finding {
	var findings []Finding
	running := false
	if o.Socket != "" {
		version, err := h.Daemon(o.Socket)
		switch {
		case err == nil:
			running = true
			findings = append(findings, ok(fmt.Sprintf("a daemon answers on %s (version %s)", o.Socket, version)))
		case denied(err):
			findings = append(findings, unseen("the control socket "+o.Socket, err))
		case h.exists(o.Socket):
			findings = append(findings, note(o.Socket+" is there, and no daemon answers on it: the next one replaces it", "systemctl start ashlar, or ashlar serve"))
		case !h.exists(path.Dir(o.Socket)):
			findings = append(findings, note(path.Dir(o.Socket)+" is not there: the control socket needs it", "mkdir -p "+path.Dir(o.Socket)+", or RuntimeDirectory= in the unit"))
		default:
			findings = append(findings, ok("no daemon runs; "+o.Socket+" is free"))
		}
	}
	for _, p := range slices.Concat(ports("NBD", o.Listen...), ports("the control API", o.Control...), ports("metrics", o.Metrics)) {
		err := h.Listen(p.address)
		_, number, _ := net.SplitHostPort(p.address) // Listen says what is wrong with it
		switch {
		case err == nil:
			findings = append(findings, ok(fmt.Sprintf("%s for %s is free", p.address, p.what)))
		case errors.Is(err, syscall.EADDRINUSE) && running:
			findings = append(findings, ok(fmt.Sprintf("%s for %s is in use, while a daemon runs", p.address, p.what)))
		case errors.Is(err, syscall.EADDRINUSE):
			findings = append(findings, failure(fmt.Sprintf("%s for %s is in use by another program", p.address, p.what), "ss -ltnp 'sport = :"+number+"' names it; or use another address"))
		case denied(err):
			findings = append(findings, note(fmt.Sprintf("this user may not listen on %s for %s", p.address, p.what), "run the daemon as root, or use a port from 1024 on"))
		default:
			findings = append(findings, failure(fmt.Sprintf("%s for %s cannot be listened on: %s", p.address, p.what, cause(err)), "use an address of this host"))
		}
	}
	return findings
}

type port struct{ what, address string }

func ports(what string, addresses ...string) []port {
	var list []port
	for _, a := range addresses {
		if a != "" {
			list = append(list, port{what, a})
		}
	}
	return list
}

// cause is the end of a chain of errors, without the addresses that net puts before it.
func cause(err error) string {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err.Error()
	}
	return reason(err)
}

func checkClock(h *Host, _ *Options) []Finding {
	synchronized, err := h.Clock()
	switch {
	case err != nil:
		return []Finding{unseen("the clock", err)}
	case !synchronized:
		return []Finding{note("the clock is not synchronized: times in logs and events cannot be compared between hosts, and certificates may not be valid", "timedatectl set-ntp true")}
	}
	return []Finding{ok("the clock is synchronized")}
}

// unitDirs are where systemd looks for units, the first before the others.
var unitDirs = []string{"/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}

const unitName = "ashlar.service"

func checkService(h *Host, _ *Options) []Finding {
	if !h.exists("/run/systemd/system") {
		return []Finding{note("systemd does not run here: something else must start the daemon, and start it again", "")}
	}
	for _, dir := range unitDirs {
		unit := dir + "/" + unitName
		if h.exists(unit) {
			return h.checkUnit(unit)
		}
	}
	return []Finding{note("the unit "+unitName+" is not installed", "install deploy/systemd/"+unitName+" as /etc/systemd/system/"+unitName+", then systemctl enable --now ashlar")}
}

// checkUnit looks whether what a unit starts is there, and whether it may do its work.
func (h *Host) checkUnit(unit string) []Finding {
	var findings []Finding
	var bounded uint64 // capabilities that matter, of those it may have
	limited := false
	for line := range strings.Lines(h.text(unit)) {
		key, value, found := strings.Cut(strings.TrimSpace(line), "=")
		if !found {
			continue
		}
		switch key {
		case "ExecStart":
			words := strings.Fields(strings.TrimLeft(value, "-@:+!"))
			if len(words) > 0 && path.IsAbs(words[0]) && !h.exists(words[0]) {
				findings = append(findings, failure(fmt.Sprintf("%s starts %s, which is not there", unit, words[0]), "install the binary there, or correct ExecStart="))
			}
			for i, w := range words {
				if w == "--config" && i+1 < len(words) && !h.exists(words[i+1]) {
					findings = append(findings, failure(fmt.Sprintf("%s names the configuration %s, which is not there", unit, words[i+1]), "install deploy/systemd/serve.yaml there"))
				}
			}
		case "CapabilityBoundingSet":
			names, inverted := strings.CutPrefix(value, "~")
			limited = true
			for _, c := range capabilities {
				if slices.Contains(strings.Fields(names), c.name) != inverted {
					bounded |= 1 << c.bit
				}
			}
		}
	}
	for _, c := range capabilities {
		if limited && !implies(bounded, c.bit) && c.unit {
			findings = append(findings, note(fmt.Sprintf("%s has no %s in its CapabilityBoundingSet: %s", unit, c.name, c.lost), "add "+c.name+" to CapabilityBoundingSet= in a drop-in: systemctl edit ashlar"))
		}
	}
	if len(findings) == 0 {
		return []Finding{ok(unit + " is installed")}
	}
	return findings
}
