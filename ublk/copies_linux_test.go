package ublk

import (
	"strings"
	"testing"

	"github.com/ashlar-storage/ashlar/datapath"
	"github.com/ashlar-storage/ashlar/datapath/nulldev"
)

// aligned takes registered buffers in multiples of so many bytes.
type aligned struct {
	datapath.Device
	bytes int
}

func (d aligned) FixedBuffers() (int, error) { return d.bytes, nil }

func TestReasonsForCopies(t *testing.T) {
	plain := nulldev.New(1 << 20)
	disk := aligned{plain, 512}
	const all = ^Features(0)
	for _, test := range []struct {
		name   string
		config Config
		driver Features
		want   string // "": none
	}{
		{"a disk", Config{Device: disk}, all, ""},
		{"only what is needed", Config{Device: disk}, zeroCopyFeatures, ""},
		{"as asked", Config{Device: disk, Copy: true}, all, "as asked"},
		{"plain buffers", Config{Device: disk, PlainBuffers: true}, all, "plain buffers"},
		{"unprivileged", Config{Device: disk, Unprivileged: true}, all, "unprivileged"},
		{"Linux 6.12", Config{Device: disk}, FeatureUserCopy | FeatureRecovery, "Linux 7.0"},
		{"Linux 6.17", Config{Device: disk}, all &^ FeatureSafeStop, "Linux 7.0"},
		{"a store of bytes", Config{Device: plain}, all, "works on the bytes"},
		{"large blocks", Config{Device: aligned{plain, 8192}}, all, "multiples of 8192"},
	} {
		err := test.config.copies(test.driver)
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}

func TestPlacesInCommands(t *testing.T) {
	q := &queue{buffers: buffersNone}
	s := &slot{queue: q, tag: 3}
	if got := autoBufferOf(q.place(s)); got != 0x1ffff { // refused by every table, and then copied
		t.Errorf("without a place: %#x", got)
	}
	q.buffers, q.fixedAlign = 300, 4096
	if got := autoBufferOf(q.place(s)); got != 1<<16|303 {
		t.Errorf("with a place: %#x", got)
	}
	for _, test := range []struct {
		flags          uint32
		offset, length uint64
		want           bool
	}{
		{kernelWrite | kernelFUA, 8192, 4096, true}, {kernelRead | kernelNeedBuffer, 8192, 4096, false},
		{kernelRead, 8192, 512, false}, {kernelRead, 512, 4096, false},
	} {
		s.request.Offset, s.request.Length = test.offset, test.length
		if got := q.passes(s, &descriptor{flags: test.flags}); got != test.want {
			t.Errorf("%+v: %t", test, got)
		}
	}
}
