// Package gate holds the bars: what Ashlar claims to reach beside its peers,
// each a table entry with the case it is measured in and the bounds it must meet.
// A bar is run by package harness like any other benchmark; Judge derives the
// verdicts from the runs, so a stored result can be judged again by newer bounds.
package gate
