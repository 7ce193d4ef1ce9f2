// Package devtest is the conformance suite of [datapath.Device]: every device
// passes it, over both engines of the reactor.
//
//	func TestConformance(t *testing.T) {
//		devtest.Run(t, func(t *testing.T) datapath.Device { … }, devtest.Options{…})
//	}
//
// It holds three kinds of tests. Rules: what datapath promises about requests,
// buffers and completions, one test a rule. Contents: random load on byte ranges
// that do not overlap, compared byte by byte with a model, unaligned neighbours
// included. Overlaps: random load on few blocks from many queues, whose history
// must be that of one register a block ([History]).
//
// Random tests print their seed when they fail; the environment variable
// ASHLAR_TEST_SEED repeats it.
package devtest
