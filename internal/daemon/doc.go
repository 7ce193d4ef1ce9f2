// Package daemon joins exports and stores: the one place that knows both. A new
// kind of store or export is one new package and one line here.
package daemon
