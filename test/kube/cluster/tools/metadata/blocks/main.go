// Blocks prints which bytes of a VolumeSnapshot of the namespace default are allocated,
// or differ from an older one: a line "OFFSET LENGTH" each, and "of SIZE" at the end. It
// asks as backup programs do, with the library of external-snapshot-metadata: finds the
// service, gets a token for it, verifies its certificate.
//
//	blocks SNAPSHOT [OLDER-SNAPSHOT]
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"github.com/kubernetes-csi/external-snapshot-metadata/pkg/iterator"
	"k8s.io/client-go/rest"
)

func main() {
	if len(os.Args) < 2 || len(os.Args) > 3 {
		fmt.Fprintln(os.Stderr, "usage: blocks SNAPSHOT [OLDER-SNAPSHOT]")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, append(os.Args[1:], "")[:2]); err != nil {
		fmt.Fprintln(os.Stderr, "blocks:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, snapshots []string) error {
	config, err := rest.InClusterConfig()
	if err != nil {
		return err
	}
	clients, err := iterator.BuildClients(config)
	if err != nil {
		return err
	}
	return iterator.GetSnapshotMetadata(ctx, iterator.Args{
		Clients: clients, Emitter: &printer{}, Namespace: "default", SnapshotName: snapshots[0], PrevSnapshotName: snapshots[1],
	})
}

// printer prints ranges as they come.
type printer struct{ size int64 }

// SnapshotMetadataIteratorRecord implements iterator.IteratorEmitter.
func (p *printer) SnapshotMetadataIteratorRecord(_ int, m iterator.IteratorMetadata) error {
	p.size = m.VolumeCapacityBytes
	for _, b := range m.BlockMetadata {
		fmt.Println(b.ByteOffset, b.SizeBytes)
	}
	return nil
}

// SnapshotMetadataIteratorDone implements iterator.IteratorEmitter.
func (p *printer) SnapshotMetadataIteratorDone(int) error {
	fmt.Println("of", p.size)
	return nil
}
