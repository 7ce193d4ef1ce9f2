package gate

import (
	"fmt"
	"math"
	"strings"

	"github.com/ashlar-storage/ashlar/benchmarks/harness"
)

// Judge derives the verdicts of a bar from a result. A claim whose numbers are
// not there is missed, not passed.
func (b Bar) Judge(r *harness.Result) []harness.Verdict {
	verdicts := make([]harness.Verdict, 0, len(b.Claims))
	for _, c := range b.Claims {
		verdicts = append(verdicts, c.judge(r, b.Case))
	}
	return verdicts
}

func (c Claim) judge(r *harness.Result, caseName string) harness.Verdict {
	m, known := harness.FindMetric(c.Metric)
	v := harness.Verdict{
		Claim: c.String(), Case: caseName, Subject: c.Subject, Metric: c.Metric, Bound: c.Bound, AtMost: c.AtMost,
		Difference: c.Minus, Shown: c.Shown,
	}
	if v.Absent = c.absent(r); v.Absent != "" {
		return v
	}
	ours, ok := r.Spread(caseName, c.Subject, m)
	if !known || !ok {
		return v
	}
	v.Spread = ours.Spread
	if len(c.Against) == 0 {
		v.Measured = ours.Median
	} else {
		var best harness.Spread
		for _, name := range c.Against {
			s, ok := r.Spread(caseName, name, m)
			if !ok {
				continue
			}
			if v.Against == "" || (s.Median < best.Median) == m.LowerIsGood && s.Median != best.Median {
				v.Against, best = name, s
			}
		}
		ratio, ok := r.Ratio(caseName, c.Subject, v.Against, m)
		if v.Against == "" || !ok {
			return v
		}
		v.Measured, v.OfRounds = ratio.OfMedians, ratio.OfRounds
		if c.Minus {
			v.Measured, v.OfRounds, _ = r.Difference(caseName, c.Subject, v.Against, m) // both were measured
		}
		v.Spread = math.Max(v.Spread, best.Spread)
	}
	v.Pass = v.Measured >= c.Bound
	if c.AtMost {
		v.Pass = v.Measured <= c.Bound
	}
	v.Pass = v.Pass || c.Shown
	return v
}

// absent tells why nobody the subject is to be compared with can run on the
// result's host, empty when somebody can.
func (c Claim) absent(r *harness.Result) string {
	var reasons []string
	for _, name := range c.Against {
		reason, ok := r.Absent[name]
		if !ok {
			return ""
		}
		reasons = append(reasons, reason)
	}
	return strings.Join(reasons, "; ")
}

// String states the claim.
func (c Claim) String() string {
	name := c.Metric
	if m, ok := harness.FindMetric(c.Metric); ok {
		name = m.Title
	}
	sign := ">="
	if c.AtMost {
		sign = "<="
	}
	bound := fmt.Sprintf("%.2fx", c.Bound)
	if c.Stretch != 0 {
		bound += fmt.Sprintf(" (aim %.2fx)", c.Stretch)
	}
	switch {
	case c.Shown:
		return fmt.Sprintf("%s: %s, documented", c.Subject, name)
	case c.Minus:
		return fmt.Sprintf("%s: %s %s %s more than %s", c.Subject, name, sign, amount(c.Metric, c.Bound), strings.Join(c.Against, ", "))
	case len(c.Against) == 0:
		return fmt.Sprintf("%s: %s %s %s", c.Subject, name, sign, amount(c.Metric, c.Bound))
	case len(c.Against) == 1:
		return fmt.Sprintf("%s: %s %s %s %s", c.Subject, name, sign, bound, c.Against[0])
	}
	return fmt.Sprintf("%s: %s %s %s the best of %s", c.Subject, name, sign, bound, strings.Join(c.Against, ", "))
}

// amount prints an absolute value of a metric as people say it.
func amount(metric string, v float64) string {
	switch metric {
	case iops:
		return fmt.Sprintf("%.0fk", v/1e3)
	case cpuShare:
		return fmt.Sprintf("%.2f %%", v*100)
	case latencyMedian, latencyTail, latencyMax, createCall, deleteCall, "call_max_us":
		return fmt.Sprintf("%.2f ms", v/1e3)
	case openSeconds, openTiB:
		return fmt.Sprintf("%.2f s", v)
	case resident:
		return fmt.Sprintf("%.1f MiB", v/(1<<20))
	}
	return fmt.Sprintf("%.2f", v)
}
