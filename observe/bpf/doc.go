// Package bpf holds the eBPF programs of package observe: their sources in C, and
// what clang made of them. The sources are ours, under the terms of their first
// lines, which the kernel asks for; x_bpfel.go and x_bpfel.o are generated of x.c, for
// all little-endian processors, and never edited.
//
// checksums.txt ties the two together: a change of a source is noticed wherever
// `go generate` runs, and only then is clang needed.
package bpf

//go:generate go run github.com/ashlar-storage/ashlar/tools/bpfgen disks.c=histogram reactors.c=histogram rings.c=histogram nbd.c=histogram self.c
