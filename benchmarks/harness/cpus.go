package harness

import (
	"fmt"
	"strconv"
	"strings"
)

// ChooseCPUs reads the CPU lists of server and client: "0", "0,2", "0-3", "any",
// or empty for the first and the second CPU this process may use. With one CPU
// the defaults pin nothing.
func ChooseCPUs(server, client string) (serverCPUs, clientCPUs []int, err error) {
	allowed := AllowedCPUs()
	if serverCPUs, err = parseCPUs(server); err != nil {
		return nil, nil, fmt.Errorf("server CPUs: %w", err)
	}
	if clientCPUs, err = parseCPUs(client); err != nil {
		return nil, nil, fmt.Errorf("client CPUs: %w", err)
	}
	if len(allowed) < 2 {
		return serverCPUs, clientCPUs, nil
	}
	if server == "" {
		serverCPUs = pick(allowed, clientCPUs)
	}
	if client == "" {
		clientCPUs = pick(allowed, serverCPUs)
	}
	return serverCPUs, clientCPUs, nil
}

// pick is the first allowed CPU that is not taken.
func pick(allowed, taken []int) []int {
	for _, cpu := range allowed {
		used := false
		for _, t := range taken {
			used = used || t == cpu
		}
		if !used {
			return []int{cpu}
		}
	}
	return nil
}

const cpuMax = 4096 // above every machine

func parseCPUs(list string) ([]int, error) {
	if list == "" || list == "any" {
		return nil, nil
	}
	var cpus []int
	for _, field := range strings.Split(list, ",") {
		from, to, isRange := strings.Cut(field, "-")
		if !isRange {
			to = from
		}
		a, errA := strconv.Atoi(from)
		b, errB := strconv.Atoi(to)
		if errA != nil || errB != nil || a < 0 || b < a || b >= cpuMax {
			return nil, fmt.Errorf("%q: want any, or numbers and ranges such as 0 or 2,4-7", list)
		}
		for cpu := a; cpu <= b; cpu++ {
			cpus = append(cpus, cpu)
		}
	}
	return cpus, nil
}
