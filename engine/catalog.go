package engine

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/google/uuid"
)

// catalogVersion is the version of pools.json.
//
//	1: pools with the devices they were last seen on
const catalogVersion = 1

const (
	catalogName = "pools.json"
	poolsDir    = "pools"       // of the files the engine makes itself
	imageSuffix = ".img"        // of these
	newSuffix   = ".ashlar-new" // of a file whose pool is not made yet
)

// catalog is the content of pools.json.
type catalog struct {
	Version int      `json:"version"`
	Pools   []record `json:"pools"`
	// Forgotten are pools that were closed for good, so that those lying in the
	// engine's own directory are not taken up again by the next Open.
	Forgotten []uuid.UUID `json:"forgotten,omitempty"`
}

// record is what the catalog remembers of a pool.
type record struct {
	UUID       uuid.UUID      `json:"uuid"`
	Name       string         `json:"name"`
	Devices    []deviceRecord `json:"devices"`
	ReadOnly   bool           `json:"read_only,omitempty"`  // it was imported so
	Destroying bool           `json:"destroying,omitempty"` // the next Open goes on with it
}

// deviceRecord is where a device of a pool was last seen.
type deviceRecord struct {
	UUID uuid.UUID `json:"uuid"`
	Path string    `json:"path"`
	Size uint64    `json:"size"` // bytes
}

// readCatalog reads pools.json; there is none on a new node.
func readCatalog(dir string) (*catalog, error) {
	path := filepath.Join(dir, catalogName)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &catalog{Version: catalogVersion}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("catalog: %w", err)
	}
	damaged := func(err error) error {
		return fmt.Errorf("catalog %s: %w (it only says where pools were seen last: move it away, start, and import them with `ashlar pool import`)", path, err)
	}
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return nil, damaged(err)
	}
	if head.Version != catalogVersion {
		return nil, fmt.Errorf("catalog %s: version %d, this program knows version %d", path, head.Version, catalogVersion)
	}
	c := &catalog{}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(c); err != nil {
		return nil, damaged(err)
	}
	names, ids := map[string]bool{}, map[uuid.UUID]bool{}
	for _, r := range c.Pools {
		if names[r.Name] || ids[r.UUID] {
			return nil, damaged(fmt.Errorf("pool %s %s is there twice", r.Name, r.UUID))
		}
		names[r.Name], ids[r.UUID] = true, true
	}
	return c, nil
}

func (c *catalog) write(dir string) error {
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return fmt.Errorf("catalog: %w", err)
	}
	if err := ReplaceFile(filepath.Join(dir, catalogName), append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("catalog: %w", err)
	}
	return nil
}

// ReplaceFile makes data the content of a file. After a crash the file is the old
// one or the new one; when the call returns, the new one is durable.
func ReplaceFile(path string, data []byte, mode fs.FileMode) error {
	temporary := path + newSuffix
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		_ = os.Remove(temporary) // ours
		return err
	}
	return syncDir(filepath.Dir(path))
}

// syncDir makes the names in a directory durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
