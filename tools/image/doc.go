// Image builds container images without a registry and without docker: one OCI
// image layout in a tar file, which `ctr images import`, `skopeo copy oci-archive:`
// and `podman load` read.
//
//	go run ./tools/image --spec FILE --output ARCHIVE [--cache DIR]
//
// The spec (YAML, see [spec]) lists images, and of each the layers. A layer is made
// of files of the repository, and of files out of Debian packages together with the
// shared libraries they need, found by their ELF headers: nothing of a package is run,
// so an image for arm64 is built anywhere.
//
// Packages are those of Debian 12 as its mirrors have them now, checked by the
// archive's signature; which versions they were is in the image, in
// /usr/share/ashlar/packages. The same packages and files give the same bytes.
//
// What a container needs at run time that ELF headers do not tell (programs that
// others start, data files) is for the spec to list.
package main
