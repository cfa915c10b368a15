package loop

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// parcelLen is how many pieces a parcel takes: as many full records as are read
// at once.
const parcelLen = readLen / (16 << 10)

// A parcel is data for one application that was read from a tunnel in one
// piece, with frame headers between. In one call it costs fewer packets. It is
// empty again when its tunnel's input has been acted on, whose memory it is;
// until then nothing else happens to its connection but that it ends.
type parcel struct {
	to     *Conn // nil if there is none
	pieces [parcelLen][]byte
	n      int // of pieces
	size   int // of all of them, in bytes

	iov [parcelLen]unix.Iovec
	msg unix.Msghdr // here, for on the stack it would be allocated each time
}

func (p *parcel) full() bool { return p.n == parcelLen }

// add adds a piece for c, whose parcel it is or becomes.
func (p *parcel) add(c *Conn, piece []byte) {
	p.to = c
	p.pieces[p.n] = piece
	p.n++
	p.size += len(piece)
}

// send gives the application what it takes at once.
func (p *parcel) send(fd int32) (int, syscall.Errno) {
	for i, piece := range p.pieces[:p.n] {
		p.iov[i].Base = unsafe.SliceData(piece)
		p.iov[i].SetLen(len(piece))
	}
	p.msg.Iov = &p.iov[0]
	p.msg.SetIovlen(p.n)
	return sendmsg(fd, &p.msg)
}

// clear forgets the pieces.
func (p *parcel) clear() {
	clear(p.pieces[:p.n])
	clear(p.iov[:p.n])
	p.to, p.n, p.size = nil, 0, 0
}

// finishParcel delivers the parcel, if there is one.
func (l *eventLoop) finishParcel() {
	p := &l.parcel
	c := p.to
	if c == nil {
		return
	}
	t := c.tunnel
	p.to = nil // it may end meanwhile, and is told once what that costs
	defer p.clear()
	n, e := p.send(c.fd)
	for e == unix.EINTR {
		n, e = p.send(c.fd)
	}
	n, ok := l.took(c, n, e, p.size)
	if !ok {
		return
	}
	rest := p.size
	for _, piece := range p.pieces[:p.n] {
		rest -= len(piece)
		k := min(n, len(piece))
		if n -= k; k < len(piece) && !l.enqueue(c, piece[k:]) {
			t.core.Consumed(c.id, rest)
			return
		}
	}
}
