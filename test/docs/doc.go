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
//
// Blocks of one page are run in order, in one machine of their own: namespaces with an
// empty /run and /var/lib, only loopback, the present bin/ashlar as ashlar, and
//
//	/dev/vdb /dev/vdc   disks of 8 GiB, empty
//	disk.img            a file of 1 GiB in the scratch folder, the working directory
//
// A line that fails, or takes longer than a minute, fails the test with its number. A
// daemon, or an export on a socket, is started with & at the end of its line; the next
// line is run when it answers. All ends with the page. It needs root.
package docs
