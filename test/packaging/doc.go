// Package packaging tests the Debian packages: what is in those of each architecture, and
// this machine's as an administrator meets it, installed, upgraded, removed and purged in
// a copy of the system that is thrown away. It holds tests only; make test-deb builds the
// packages and runs them.
package packaging
