// Package docs keeps README.md and docs/ from saying what is not so. It holds tests
// only.
//
// Of every fenced block, run or not: each `ashlar COMMAND --flag` in it exists by the
// man pages, each `make TARGET` by the Makefile. Every relative link leads somewhere. Code under
//
//	<!-- from: FILE -->
//
// stands in that file, which compiles and is tested.
//
// A block is run, by make test-docs, when the line above its fence is a mark. A mark
// does not show on the page:
//
//	<!-- test: run -->                          run it, line by line, as one shell
//	<!-- test: run without nbd-client mount --> but leave out lines with these commands
//	<!-- test: run in repository -->            where the Makefile is, not in the scratch folder
//	<!-- test: run on a node -->                with a node, see below
//	<!-- test: run as a daemon -->              each line is a daemon of that node, in the place of the one before
//
// Blocks of one page are run in order, in one machine of their own: namespaces with an
// empty /run and /var/lib, only loopback, the present bin/ashlar as ashlar, and
//
//	/dev/vdb /dev/vdc   disks of 8 GiB, empty
//	disk.img            a file of 1 GiB in the scratch folder, the working directory
//
// and certificates in that folder and in /etc/ashlar: server.pem, server.key, clients-ca.pem,
// operators-ca.pem; those of a client, host-a, in /etc/ashlar/pki. The node has a volume data
// with a snapshot data@monday; the host called host exports x; storage is another name of
// this one, and 10.0.0.5 one of its addresses.
//
// A line that fails, or takes longer than a minute, fails the test with its number. A
// daemon, or an export on a socket, is started with & at the end of its line; the next
// line is run when it answers. All ends with the page, mounted and attached or not. It
// needs root.
package docs
