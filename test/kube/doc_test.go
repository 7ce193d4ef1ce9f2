// Package kube deploys Ashlar on Kubernetes and uses it as people do: claims, pods,
// snapshots, and what goes wrong on nodes.
//
// `make test-kube` does all of it on one machine: cluster/build.sh gets Kubernetes,
// cluster/up.sh starts it, the tests deploy deploy/ashlar.yaml with the differences
// that cluster/kustomization.yaml lists, and cluster/down.sh removes everything.
// Without it only the tests of the manifests themselves run. `make test-kube-vm` does
// the same with one node in an emulated machine (vm.sh), for the steps that ask for more
// than this machine's kernel has: dm-crypt, and claims on ublk devices.
//
// Pods never run for a fixed time to see something happen: each wait has a condition,
// and an end that is far away.
package kube
