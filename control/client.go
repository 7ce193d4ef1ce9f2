package control

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/ashlar-storage/ashlar/control/controlpb"
)

// DefaultAddress is where a daemon listens when it is told nothing.
const DefaultAddress = "unix:///run/ashlar/control.sock"

// messageMax bounds an answer: a list of 100,000 volumes takes some 40 MiB.
const messageMax = 64 << 20

// Options say how to reach a daemon.
type Options struct {
	// TLS is the client's side of mutual TLS, see LoadTLS. An address on TCP needs
	// it, a unix socket must not have it.
	TLS *tls.Config
	// Timeout bounds each call that has no deadline of its own, and the connection
	// in Dial; 0: no bound. Streams are not bounded.
	Timeout time.Duration
	// Dialer makes connections instead of the address, which then only names the
	// daemon in errors; for a daemon in the same process. No TLS is used.
	Dialer func(context.Context) (net.Conn, error)
}

// Client is a connection to a daemon. All its methods, and the services, may be
// used from any goroutine.
type Client struct {
	Pools     controlpb.PoolsClient
	Volumes   controlpb.VolumesClient
	Snapshots controlpb.SnapshotsClient
	Jobs      controlpb.JobsClient
	Events    controlpb.EventsClient
	Devices   controlpb.DevicesClient
	Observe   controlpb.ObserveClient
	Node      controlpb.NodeClient

	address string        // immutable, as the caller wrote it
	timeout time.Duration // immutable
	conn    *grpc.ClientConn

	mu      sync.Mutex
	dialErr error // of the last connection made or tried
}

// Dial connects to the daemon at address, unix:///PATH or HOST:PORT, and returns
// when it has answered, or with the reason why it cannot be reached.
func Dial(ctx context.Context, address string, o Options) (*Client, error) {
	network, target, err := ParseAddress(address)
	if err != nil {
		return nil, err
	}
	c := &Client{address: address, timeout: o.Timeout}
	transport := insecure.NewCredentials()
	switch {
	case o.Dialer != nil:
	case network == "tcp" && o.TLS == nil:
		return nil, Errorf(ErrInvalid, "", "", "the address %s is on TCP, which takes TLS only: give a certificate, its key and the authority of the daemon's", address)
	case network == "unix" && o.TLS != nil:
		return nil, Errorf(ErrInvalid, "", "", "the address %s is a unix socket, which takes no TLS", address)
	case o.TLS != nil:
		transport = credentials.NewTLS(o.TLS)
	}
	dial := o.Dialer
	if dial == nil {
		dial = func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, target)
		}
	}
	authority := target // what a certificate must name
	if network == "unix" {
		authority = "localhost"
	}
	c.conn, err = grpc.NewClient("passthrough:///"+authority,
		grpc.WithTransportCredentials(transport),
		grpc.WithConnectParams(grpc.ConnectParams{ // a daemon that was started again is found within seconds
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			conn, err := dial(ctx)
			c.mu.Lock()
			c.dialErr = err
			c.mu.Unlock()
			return conn, err
		}),
		grpc.WithChainUnaryInterceptor(c.unary),
		grpc.WithChainStreamInterceptor(c.stream),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(messageMax)),
	)
	if err != nil {
		return nil, fmt.Errorf("control: address %s: %w", address, err)
	}
	c.Pools = controlpb.NewPoolsClient(c.conn)
	c.Volumes = controlpb.NewVolumesClient(c.conn)
	c.Snapshots = controlpb.NewSnapshotsClient(c.conn)
	c.Jobs = controlpb.NewJobsClient(c.conn)
	c.Events = controlpb.NewEventsClient(c.conn)
	c.Devices = controlpb.NewDevicesClient(c.conn)
	c.Observe = controlpb.NewObserveClient(c.conn)
	c.Node = controlpb.NewNodeClient(c.conn)
	if err := c.connect(ctx); err != nil {
		_ = c.conn.Close() // unused
		return nil, err
	}
	return c, nil
}

// connect waits for the first connection to stand or to fail.
func (c *Client) connect(ctx context.Context) error {
	if c.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.timeout)
		defer cancel()
	}
	c.conn.Connect()
	for {
		state := c.conn.GetState()
		switch state {
		case connectivity.Ready:
			return nil
		case connectivity.TransientFailure:
			// A call fails at once now, and its status says why.
			_, err := c.Node.Health(ctx, new(controlpb.HealthRequest))
			return err // nil: the second attempt was lucky
		}
		if !c.conn.WaitForStateChange(ctx, state) {
			return c.failure(ctx.Err())
		}
	}
}

// Close ends the connection. Calls in flight fail.
func (c *Client) Close() error { return c.conn.Close() }

// Address is the address given to Dial.
func (c *Client) Address() string { return c.address }

// WaitJob waits for the end of a job. It calls progress, unless nil, with each
// state of the job it sees, the last included. A job that failed is an error.
func (c *Client) WaitJob(ctx context.Context, id string, progress func(*controlpb.Job)) (*controlpb.Job, error) {
	stream, err := c.Jobs.Watch(ctx, &controlpb.WatchJobRequest{Id: id})
	if err != nil {
		return nil, err
	}
	var job *controlpb.Job
	for {
		next, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return job, err
		}
		job = next
		if progress != nil {
			progress(job)
		}
	}
	switch {
	case job == nil || job.GetState() == controlpb.JobState_JOB_STATE_RUNNING:
		return job, Errorf(ErrUnavailable, "job", id, "job %s: the daemon ended the report before the job ended", id)
	case job.GetState() == controlpb.JobState_JOB_STATE_FAILED:
		return job, &Error{Reason: ErrUnknown, Kind: "job", Name: id, Message: fmt.Sprintf("job %s failed: %s", id, job.GetError())}
	}
	return job, nil
}

// ParseAddress splits an address, unix:///PATH or HOST:PORT, into what net.Dial
// takes: the network unix or tcp, and the path or host and port.
func ParseAddress(address string) (network, target string, err error) {
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		path = strings.TrimPrefix(path, "//")
		if !filepath.IsAbs(path) {
			return "", "", Errorf(ErrInvalid, "", "", "the address %q is no unix:///PATH with an absolute path", address)
		}
		return "unix", path, nil
	}
	if filepath.IsAbs(address) {
		return "unix", address, nil
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil || host == "" || port == "" || strings.Contains(address, "/") {
		return "", "", Errorf(ErrInvalid, "", "", "the address %q is neither unix:///PATH nor HOST:PORT", address)
	}
	return "tcp", address, nil
}

// LoadTLS reads the client's side of mutual TLS from PEM files: its certificate,
// the key, and the authority that the daemon's certificate must come from. The
// daemon's name is the host of the address, unless serverName says another.
func LoadTLS(certFile, keyFile, caFile, serverName string) (*tls.Config, error) {
	certificate, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("TLS certificate %s with key %s: %w", certFile, keyFile, err)
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("TLS authorities: %w", err)
	}
	authorities := x509.NewCertPool()
	if !authorities.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("TLS authorities %s: no certificate in the file", caFile)
	}
	return &tls.Config{Certificates: []tls.Certificate{certificate}, RootCAs: authorities, ServerName: serverName, MinVersion: tls.VersionTLS13}, nil
}

// unary bounds a call and translates its error.
func (c *Client) unary(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
	if _, bounded := ctx.Deadline(); !bounded && c.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.timeout)
		defer cancel()
	}
	return c.failure(invoke(ctx, method, request, reply, conn, options...))
}

// stream translates the errors of a stream.
func (c *Client) stream(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, streamer grpc.Streamer, options ...grpc.CallOption) (grpc.ClientStream, error) {
	s, err := streamer(ctx, desc, conn, method, options...)
	if err != nil {
		return nil, c.failure(err)
	}
	return &clientStream{ClientStream: s, c: c}, nil
}

type clientStream struct {
	grpc.ClientStream
	c *Client
}

// RecvMsg implements grpc.ClientStream.
func (s *clientStream) RecvMsg(m any) error { return s.c.failure(s.ClientStream.RecvMsg(m)) }

// failure makes an Error of what a call returned; nil and io.EOF stay.
func (c *Client) failure(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	s := status.Convert(err)
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		s = status.FromContextError(err)
	}
	e := fromStatus(s)
	c.mu.Lock()
	dialErr := c.dialErr
	c.mu.Unlock()
	switch s.Code() {
	case codes.DeadlineExceeded:
		e.Message = "no answer from the daemon at " + c.address + " in time"
		e.Remedy = "it may still do what was asked: look before you repeat it, or give it more time"
		if dialErr != nil {
			return c.unreachable(dialErr)
		}
	case codes.Canceled:
		e.Message = "canceled"
	case codes.Unavailable:
		switch {
		case e.Name != "" || e.Remedy != "": // the daemon says so
		case dialErr != nil:
			return c.unreachable(dialErr)
		default:
			if text, ok := strings.CutPrefix(s.Message(), "connection error: desc = "); ok { // gRPC's words for a handshake that failed
				return c.unreachable(errors.New(strings.TrimPrefix(strings.Trim(text, `"`), "transport: ")))
			}
			e.Message = "lost the connection to the daemon at " + c.address + ": " + s.Message()
			e.Remedy = "look whether what was asked is done before you repeat it"
		}
	}
	return e
}

// unreachable is the error of a daemon that does not answer, and why.
func (c *Client) unreachable(cause error) *Error {
	e := &Error{Reason: ErrUnavailable, Message: "cannot reach the daemon at " + c.address, cause: cause}
	switch {
	case errors.Is(cause, syscall.ENOENT), errors.Is(cause, syscall.ECONNREFUSED):
		e.Message += ": is `ashlar serve` running? (--server / ASHLAR_SERVER)"
	case errors.Is(cause, fs.ErrPermission):
		e.Message += ": permission denied"
		e.Remedy = "use a user who may open the socket, such as root"
	default:
		e.Message += ": " + cause.Error()
		e.Remedy = "is `ashlar serve` running? (--server / ASHLAR_SERVER)"
	}
	return e
}
