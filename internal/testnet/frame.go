package testnet

import (
	"cmp"
	"encoding/binary"
	"net"
	"net/netip"
)

// A Frame is an Ethernet frame that a test makes by hand, to send what no
// socket would.
type Frame struct {
	SrcMAC, DstMAC net.HardwareAddr // zero if nil
	VLANs          []uint16         // tags, outermost first
	Src, Dst       netip.AddrPort
	UDP            bool // else TCP
	Flags          byte // of TCP
	Seq, Ack       uint32
	Payload        []byte
	// IPOptions are put behind the IPv4 header, in fours of bytes.
	IPOptions []byte
	// DestinationOptions is how many such headers are before an IPv6
	// packet's TCP or UDP.
	DestinationOptions int
	// Extensions are the kinds of more extension headers of IPv6, in this
	// order, behind those of DestinationOptions: 0 hop-by-hop options, 43
	// routing, 44 a fragment header that fragments nothing, 51 authentication,
	// 60 destination options. Each has eight bytes, that of kind 51 twelve.
	Extensions []byte
	// Fragment makes it a fragment: the first if Offset, in units of eight
	// bytes, is 0. Of a later one only Payload is sent.
	Fragment      bool
	MoreFragments bool
	Offset        uint16
	// ID is the identification of fragments; 0x1234 if it is 0.
	ID uint16
	// OptionsInside is how many headers of destination options are behind
	// the fragment header.
	OptionsInside int
	// First, if not 0, is how many bytes a first fragment has behind its
	// header.
	First int
	// Cut drops that many bytes from the end, after lengths were written.
	Cut int
}

// Flags of TCP.
const (
	FIN = 1 << iota
	SYN
	RST
	PSH
	ACK
)

// Bytes returns the frame, with right lengths and checksums.
func (f Frame) Bytes() []byte {
	out := append(pad(f.DstMAC), pad(f.SrcMAC)...)
	for _, id := range f.VLANs {
		out = append(out, 0x81, 0x00, byte(id>>8), byte(id))
	}
	body, protocol := f.segment()
	if f.Fragment && f.Offset > 0 {
		body = f.Payload
	} else if f.First > 0 {
		body = body[:f.First-8*f.OptionsInside]
	}
	if f.Src.Addr().Is4() {
		out = append(out, 0x08, 0x00)
		out = append(out, f.ipv4(len(body), protocol)...)
	} else {
		out = append(out, 0x86, 0xdd)
		out = append(out, f.ipv6(len(body), protocol)...)
	}
	out = append(out, body...)
	return out[:len(out)-f.Cut]
}

func pad(m net.HardwareAddr) []byte {
	if m == nil {
		return make([]byte, 6)
	}
	return append([]byte(nil), m...)
}

func (f Frame) ipv4(body int, protocol byte) []byte {
	h := make([]byte, 20, 60)
	h = append(h, f.IPOptions...)
	h[0] = 0x40 | byte(len(h)/4)
	binary.BigEndian.PutUint16(h[2:], uint16(len(h)+body))
	if f.Fragment {
		binary.BigEndian.PutUint16(h[4:], f.id())
		word := f.Offset
		if f.MoreFragments {
			word |= 0x2000
		}
		binary.BigEndian.PutUint16(h[6:], word)
	}
	h[8], h[9] = 64, protocol
	src, dst := f.Src.Addr().As4(), f.Dst.Addr().As4()
	copy(h[12:], src[:])
	copy(h[16:], dst[:])
	binary.BigEndian.PutUint16(h[10:], ^sum(0, h))
	return h
}

func (f Frame) ipv6(body int, protocol byte) []byte {
	h := make([]byte, 40)
	h[0], h[7] = 0x60, 64
	src, dst := f.Src.Addr().As16(), f.Dst.Addr().As16()
	copy(h[8:], src[:])
	copy(h[24:], dst[:])
	var ext []byte
	next := &h[6]
	add := func(kind byte, hdr [8]byte) {
		*next = kind
		ext = append(ext, hdr[:]...)
		next = &ext[len(ext)-8]
	}
	for range f.DestinationOptions {
		add(60, [8]byte{2: 1, 3: 4}) // PadN
	}
	for _, kind := range f.Extensions {
		hdr := [8]byte{}
		switch kind {
		case 0, 60:
			hdr = [8]byte{2: 1, 3: 4} // PadN
		case 43:
			hdr[2] = 4 // a type that is passed over, with no segments left
		case 51:
			hdr[1] = 1
		}
		add(kind, hdr)
		if kind == 51 {
			ext = append(ext, 0, 0, 0, 0)
			next = &ext[len(ext)-12]
		}
	}
	if f.Fragment {
		word := f.Offset << 3
		if f.MoreFragments {
			word |= 1
		}
		add(44, [8]byte{2: byte(word >> 8), 3: byte(word), 6: byte(f.id() >> 8), 7: byte(f.id())})
	}
	for range f.OptionsInside {
		add(60, [8]byte{2: 1, 3: 4})
	}
	*next = protocol
	binary.BigEndian.PutUint16(h[4:], uint16(len(ext)+body))
	return append(h, ext...)
}

func (f Frame) id() uint16 { return cmp.Or(f.ID, 0x1234) }

func (f Frame) segment() (b []byte, protocol byte) {
	ports := func(b []byte) {
		binary.BigEndian.PutUint16(b[0:], f.Src.Port())
		binary.BigEndian.PutUint16(b[2:], f.Dst.Port())
	}
	check := 16
	if f.UDP {
		protocol, check = 17, 6
		b = make([]byte, 8)
		binary.BigEndian.PutUint16(b[4:], uint16(8+len(f.Payload)))
	} else {
		protocol = 6
		b = make([]byte, 20)
		binary.BigEndian.PutUint32(b[4:], f.Seq)
		binary.BigEndian.PutUint32(b[8:], f.Ack)
		b[12], b[13] = 5<<4, f.Flags
		binary.BigEndian.PutUint16(b[14:], 0xffff)
	}
	ports(b)
	b = append(b, f.Payload...)
	src, dst := f.Src.Addr().AsSlice(), f.Dst.Addr().AsSlice()
	pseudo := sum(sum(sum(0, src), dst), []byte{0, protocol, byte(len(b) >> 8), byte(len(b))})
	binary.BigEndian.PutUint16(b[check:], ^sum(pseudo, b))
	return b, protocol
}

// sum adds b to a checksum of RFC 1071.
func sum(start uint16, b []byte) uint16 {
	s := uint32(start)
	for i := 0; i < len(b); i += 2 {
		s += uint32(b[i]) << 8
		if i+1 < len(b) {
			s += uint32(b[i+1])
		}
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}
