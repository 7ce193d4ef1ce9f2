package nbd

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/ashlar-storage/ashlar/datapath"
)

// resendAfter is an age that no client sends a request again below: the kernel's
// driver counts in seconds (drivers/block/nbd.c, NBD_ATTR_TIMEOUT), and one that
// connects again has its network time out first.
const resendAfter = 500 * time.Millisecond

// ending finds out, before a change is given to the device, whether the client has
// ended the connection long after it sent that change. Then it may have sent the
// change again on another connection, had its answer, and changed the same place
// since: the old change must not be begun any more. Changes that the device has
// already are kept in order there.
//
// To ask costs a system call. It is asked only where something has been on the way
// from the client for longer than resendAfter, which it is not on a connection that
// keeps up. Between the question and the device lie microseconds; a client would
// have to end the connection, and have a copy and a newer change of the same place
// answered within them.
type ending struct {
	caughtUp int64 // when all that had come was begun, by the reactor's clock
	ended    bool  // long after something came that was not begun
}

// lookForEnd notes whether the client has gone while something it sent had to wait.
// It reports whether the connection is over: what waits is a change.
func (c *conn) lookForEnd() bool {
	if !c.ended && time.Duration(c.reactor.Clock()-c.caughtUp) > resendAfter {
		c.ended = hungUp(c.fd)
	}
	return c.ended && (c.state == receivePayload || c.blocked != nil && c.blocked.changes()) && c.dropOld()
}

// notBehind notes that everything that came has been begun.
func (c *conn) notBehind() {
	if c.state == receiveHeader && c.rxStart == c.rxEnd {
		c.caughtUp = c.reactor.Now()
	}
}

func (o *op) changes() bool {
	return int(o.command) < len(commandOps) && (&datapath.Request{Op: commandOps[o.command]}).Modifies()
}

// dropOld ends the connection without the changes that wait.
func (c *conn) dropOld() bool {
	c.server.log.Debug("nbd client left while changes waited: they are not begun, it may have sent them again", "export", c.export.Name, "connection", c.id, "remote", c.remote)
	c.kill()
	return true
}

// hungUp reports whether the peer of a socket sends no more.
func hungUp(fd int) bool {
	p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	n, err := unix.Poll(p[:], 0)
	return err == nil && n > 0 && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
}
