// Package authority makes certificates for tests, as files of PEM. It is apart from
// package testenv because it knows the network, which tests of the data path must not.
package authority
