package nbd

import (
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestURIParse(t *testing.T) {
	for _, tt := range []struct {
		in               string
		want             URI
		network, address string
		out              string // "" when it is in
	}{
		{in: "nbd://example.com/disk", want: URI{Host: "example.com", Export: "disk"}, network: "tcp", address: "example.com:10809"},
		{in: "nbd://example.com/", want: URI{Host: "example.com"}, network: "tcp", address: "example.com:10809"},
		{in: "nbd://example.com", want: URI{Host: "example.com"}, network: "tcp", address: "example.com:10809", out: "nbd://example.com/"},
		{in: "nbd://example.com//disk", want: URI{Host: "example.com", Export: "/disk"}, network: "tcp", address: "example.com:10809"},
		{in: "nbd://example.com/hello%20world", want: URI{Host: "example.com", Export: "hello world"}, network: "tcp", address: "example.com:10809"},
		{in: "nbd://example.com:10809/export", want: URI{Host: "example.com", Port: 10809, Export: "export"}, network: "tcp", address: "example.com:10809"},
		{in: "nbd://10.0.0.1:7/%D0%B4%3F%23a", want: URI{Host: "10.0.0.1", Port: 7, Export: "д?#a"}, network: "tcp", address: "10.0.0.1:7"},
		{in: "nbd://[::1]:7/x", want: URI{Host: "::1", Port: 7, Export: "x"}, network: "tcp", address: "[::1]:7"},
		{in: "nbd://[fe80::1%25eth0]/x", want: URI{Host: "fe80::1%eth0", Export: "x"}, network: "tcp", address: "[fe80::1%eth0]:10809"},
		{in: "nbd:///x", want: URI{Export: "x"}, network: "tcp", address: "localhost:10809"},
		{in: "nbd://", want: URI{}, network: "tcp", address: "localhost:10809", out: "nbd:///"},
		{in: "nbds://alice@h/x?tls-type=x509&tls-hostname=other&tls-verify-peer=0&tls-certificates=/etc/pki/a+b", want: URI{
			TLS: true, User: "alice", Host: "h", Export: "x", TLSType: "x509", TLSHostname: "other", TLSNoVerify: true, TLSCertificates: "/etc/pki/a+b",
		}, network: "tcp", address: "h:10809"},
		{in: "nbds://h/x?tls-verify-peer=1", want: URI{TLS: true, Host: "h", Export: "x"}, network: "tcp", address: "h:10809", out: "nbds://h/x"},
		{in: "nbd+unix:///export?socket=nbd.sock", want: URI{Unix: true, Export: "export", Socket: "nbd.sock"}, network: "unix", address: "nbd.sock"},
		{in: "nbd+unix://?socket=/run/a%26b", want: URI{Unix: true, Socket: "/run/a&b"}, network: "unix", address: "/run/a&b", out: "nbd+unix:///?socket=/run/a%26b"},
		{in: "nbd+unix:///?socket=%00/abstract", want: URI{Unix: true, Socket: "\x00/abstract"}, network: "unix", address: "@/abstract"},
		{in: "nbd+unix:///?socket=@file", want: URI{Unix: true, Socket: "@file"}, network: "unix", address: "./@file"},
		{in: "nbds+unix:///x?socket=s&tls-psk-file=f", want: URI{TLS: true, Unix: true, Export: "x", Socket: "s", TLSPSKFile: "f"}, network: "unix", address: "s"},
		{in: "nbd://h/x?x-try=1&x-flag=", want: URI{Host: "h", Export: "x", Experimental: []URIParameter{{"x-try", "1"}, {"x-flag", ""}}}, network: "tcp", address: "h:10809"},
		{in: "NBD://H/x", want: URI{Host: "H", Export: "x"}, network: "tcp", address: "H:10809", out: "nbd://H/x"},
	} {
		t.Run(tt.in, func(t *testing.T) {
			u, err := ParseURI(tt.in)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(*u, tt.want) {
				t.Errorf("got %+v\nwant %+v", *u, tt.want)
			}
			if network, address := u.Address(); network != tt.network || address != tt.address {
				t.Errorf("address %s %s, want %s %s", network, address, tt.network, tt.address)
			}
			if tt.out == "" {
				tt.out = tt.in
			}
			if got := u.String(); got != tt.out {
				t.Errorf("String: %s, want %s", got, tt.out)
			}
		})
	}
}

func TestURIParseRefuses(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"", "scheme"},
		{"http://h/x", "scheme"},
		{"nbd+vsock://1/x", "scheme"},
		{"nbd:h:10809", "no //"},
		{"nbd:unix:/run/s", "no //"},
		{"nbd://h/x#part", "fragment"},
		{"nbd://h/x#", "fragment"},
		{"nbd://h:0/x", "port"},
		{"nbd://h:65536/x", "port"},
		{"nbd://a:b@h/x", "password"},
		{"nbd://h%20h/x", "escape"},
		{"nbd://h!h/x", "host"},
		{"nbd://[zz::1]/x", "host"},
		{"nbd+unix:///x", "no socket"},
		{"nbd+unix:///x?socket=", "socket"},
		{"nbd+unix:///x?socket=%00", "socket"},
		{"nbd+unix:///x?socket=a%00b", "socket"},
		{"nbd+unix://h/x?socket=s", "unix socket at once"},
		{"nbd://h/x?socket=s", "nbd+unix"},
		{"nbd://h/x?colour=red", "unknown parameter"},
		{"nbd://h/x?tls-type=a&tls-type=b", "tls-type"},
		{"nbd://h/x?tls-hostname=a&tls-hostname=b", "twice"},
		{"nbd://h/x?tls-verify-peer=yes", "tls-verify-peer"},
		{"nbd://h/x?%zz=1", "%zz"},
		{"nbd://h/x?x-a=%z", "%z"},
		{"nbd://h/%ff", "UTF-8"},
		{"nbd://h/a%00b", "NUL"},
		{"nbd://h/" + strings.Repeat("x", 4097), "4097 bytes"},
	} {
		u, err := ParseURI(tt.in)
		if err == nil {
			t.Errorf("%s: parsed as %+v", tt.in, u)
		} else if !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %q does not mention %q", tt.in, err, tt.want)
		}
	}
}

func TestURIOptions(t *testing.T) {
	dir := clientCertificates(t).dir
	for _, tt := range []struct {
		uri             string
		tls, required   bool
		roots, pair     bool
		name, wantError string
	}{
		{uri: "nbd://h/x"},
		{uri: "nbd://h/x?tls-certificates=" + dir, tls: true, roots: true, pair: true},
		{uri: "nbds://h/x", tls: true, required: true},
		{uri: "nbds+unix:///x?socket=s&tls-hostname=n", tls: true, required: true, name: "n"},
		{uri: "nbds://h/x?tls-certificates=" + filepath.Join(dir, "absent"), wantError: "ca-cert.pem"},
		{uri: "nbds://h/x?tls-certificates=" + filepath.Join(dir, "half"), wantError: "client-key.pem"},
		{uri: "nbds://h/x?tls-certificates=" + filepath.Join(dir, "empty"), wantError: "no certificate"},
		{uri: "nbds://h/x?tls-type=psk", wantError: "pre-shared"},
		{uri: "nbds://h/x?tls-type=anon", wantError: "not supported"},
		{uri: "nbd://h/x?tls-psk-file=f", wantError: "pre-shared"},
	} {
		u, err := ParseURI(tt.uri)
		if err != nil {
			t.Error(err)
			continue
		}
		o, err := u.Options(Options{Depth: 3})
		if tt.wantError != "" {
			if err == nil || !strings.Contains(err.Error(), tt.wantError) {
				t.Errorf("%s: error %v, want %q", tt.uri, err, tt.wantError)
			}
			continue
		}
		if err != nil {
			t.Error(err)
			continue
		}
		if o.Export != "x" || o.Depth != 3 || o.TLSRequired != tt.required || (o.TLSConfig != nil) != tt.tls {
			t.Errorf("%s: options %+v", tt.uri, o)
		}
		if c := o.TLSConfig; c != nil && ((c.RootCAs != nil) != tt.roots || (len(c.Certificates) == 1) != tt.pair || c.ServerName != tt.name) {
			t.Errorf("%s: TLS name %q, roots %v, %d certificates", tt.uri, c.ServerName, c.RootCAs != nil, len(c.Certificates))
		}
	}
}

func FuzzURI(f *testing.F) {
	for _, seed := range []string{
		"nbd://example.com:10809/export", "nbds://alice@[fe80::1%25eth0]:1/a%20b?tls-type=psk&tls-psk-file=/f", "nbd+unix:////x?socket=%00/abstract",
		"nbds+unix:///x?socket=a+b&tls-hostname=h&tls-verify-peer=0&tls-certificates=/d&x-y=%26&x-z", "nbd:h", "nbd://h/x?=&&socket", "nbd://%zz", "nbd://[::1",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			return
		}
		again, err := ParseURI(u.String())
		if err != nil {
			t.Fatalf("%q gives %q: %v", s, u, err)
		}
		if !reflect.DeepEqual(u, again) {
			t.Fatalf("%q gives %q: %+v, then %+v", s, u, u, again)
		}
		if network, address := u.Address(); network == "" || address == "" {
			t.Fatalf("%q has no address", s)
		}
	})
}
