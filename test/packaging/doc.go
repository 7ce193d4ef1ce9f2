// Package packaging tests the Debian package as an administrator meets it: it is
// installed, upgraded, removed and purged in a copy of this machine's system that is
// thrown away. It holds tests only; make test-deb builds the package and runs them.
package packaging
