// Package controlpb is the control API as gRPC sees it. control.proto is its
// description, and the only file here to be read or changed; the other files are
// generated from it by `go generate`.
package controlpb

//go:generate go run github.com/ashlar-storage/ashlar/tools/protogen control.proto
