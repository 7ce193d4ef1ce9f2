// Package vm runs bin/ashlar under real kernel clients in a virtual machine: User
// Mode Linux 6.1 from Debian, which needs neither KVM nor a module on the host.
//
// uml-run.sh boots the guest around one command; kernel-nbd.sh is that command
// for the kernel's nbd client. The tests run in `make test-uml`, as root.
package vm
