package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// writeArchive builds the images of s into one archive.
func writeArchive(output string, s *spec, d *debian) error {
	top := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, image := range s.Images {
		index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
		for _, arch := range image.Archs {
			built, err := buildImage(image, arch, d)
			if err != nil {
				return fmt.Errorf("%s for %s: %w", image.Name, arch, err)
			}
			index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: built,
				Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
		}
		// containerd takes its name from the first, others from the second.
		top = mutate.AppendManifests(top, mutate.IndexAddendum{Add: index, Descriptor: v1.Descriptor{Annotations: map[string]string{
			"io.containerd.image.name":          image.Name,
			"org.opencontainers.image.ref.name": image.Name,
		}}})
	}
	dir, err := os.MkdirTemp(filepath.Dir(output), ".image-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }() // ours
	if _, err := layout.Write(dir, top); err != nil {
		return err
	}
	packed := filepath.Join(dir, "archive")
	if err := pack(packed, dir); err != nil {
		return err
	}
	return os.Rename(packed, output)
}

func buildImage(s imageSpec, arch string, d *debian) (v1.Image, error) {
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	config := v1.ConfigFile{OS: "linux", Architecture: arch, RootFS: v1.RootFS{Type: "layers"},
		Config: v1.Config{Entrypoint: s.Entrypoint, Labels: s.Labels}}
	for _, name := range slices.Sorted(maps.Keys(s.Env)) {
		config.Config.Env = append(config.Config.Env, name+"="+s.Env[name])
	}
	image, err := mutate.ConfigFile(image, &config)
	if err != nil {
		return nil, err
	}
	for _, l := range s.Layers {
		t, err := buildLayer(l, arch, d)
		if err != nil {
			return nil, err
		}
		text, err := t.tar()
		if err != nil {
			return nil, err
		}
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(text)), nil },
			tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.BestSpeed), tarball.WithCompressedCaching)
		if err != nil {
			return nil, err
		}
		if image, err = mutate.AppendLayers(image, layer); err != nil {
			return nil, err
		}
	}
	return image, nil
}

// pack writes the image layout in dir as a tar file.
func pack(output, dir string) error {
	t := tree{}
	for _, name := range []string{"oci-layout", "index.json"} {
		t.put(name, entry{source: filepath.Join(dir, name), mode: 0o644})
	}
	if err := t.addDir("blobs", filepath.Join(dir, "blobs")); err != nil {
		return err
	}
	f, err := os.OpenFile(output, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	w := tar.NewWriter(f)
	for _, name := range slices.Sorted(maps.Keys(t)) {
		if err := packFile(w, name, t[name]); err != nil {
			_ = f.Close() // the first error counts
			return err
		}
	}
	if err := w.Close(); err != nil {
		_ = f.Close() // the first error counts
		return err
	}
	return f.Close()
}

func packFile(w *tar.Writer, name string, e entry) error {
	if e.mode&fs.ModeDir != 0 {
		return w.WriteHeader(header(name+"/", tar.TypeDir, 0o755))
	}
	f, err := os.Open(e.source)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // only read
	info, err := f.Stat()
	if err != nil {
		return err
	}
	h := header(name, tar.TypeReg, 0o644)
	h.Size = info.Size()
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err = io.Copy(w, f)
	return err
}
