package dns

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"strings"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/weft-mesh/weft/mesh"
)

const (
	headerSize = 12
	// minUDP is what every client takes (RFC 1035, section 4.2.1).
	minUDP = 512
	// maxRecords bounds the records of a query that are read: an OPT and a
	// signature are what is used.
	maxRecords = 16

	typeSVCB  dnsmessage.Type = 64 // RFC 9460
	typeHTTPS dnsmessage.Type = 65
)

// Bits of the third and fourth byte of a header (RFC 1035, section 4.1.1).
const (
	bitResponse  = 1 << 7 // third
	bitTruncated = 1 << 1
	maskOpcode   = 0xf << 3
	bitRecursion = 1 // asked for
	bitAvailable = 1 << 7
	maskRCode    = 0xf
)

// A problem is why a message is not looked up.
type problem uint8

const (
	fine      problem = iota
	notQuery          // an answer, or not even a header: never answered, or two of us would talk for ever
	malformed         // the sender is told
	strange           // well-formed enough for others, and not for us
)

// A query is a message that asks one thing.
type query struct {
	header   dnsmessage.Header
	question dnsmessage.Question
	host     mesh.Host // of the question: lower case, without the last dot
	kind     dnsmessage.Type
	class    dnsmessage.Class

	edns     bool // has an OPT record (RFC 6891)
	dnssecOK bool // in it
	udpSize  int  // bytes that the client takes over UDP
}

// parse reads what a client sent.
func parse(msg []byte) (query, problem) {
	q := query{udpSize: minUDP}
	if len(msg) < headerSize || msg[2]&bitResponse != 0 {
		return q, notQuery
	}
	if msg[2]&maskOpcode != 0 {
		return q, strange // an update or a notification
	}
	end, ok := questionEnd(msg)
	if binary.BigEndian.Uint16(msg[4:]) != 1 || !ok {
		return q, malformed // RFC 9619: a query asks one thing
	}
	q.kind = dnsmessage.Type(binary.BigEndian.Uint16(msg[end-4:]))
	q.class = dnsmessage.Class(binary.BigEndian.Uint16(msg[end-2:]))
	if binary.BigEndian.Uint16(msg[6:]) != 0 || binary.BigEndian.Uint16(msg[8:]) != 0 || binary.BigEndian.Uint16(msg[10:]) > maxRecords {
		return q, strange // has answers (an incremental transfer, for one)
	}
	var p dnsmessage.Parser
	var err error
	if q.header, err = p.Start(msg); err != nil {
		return q, malformed
	}
	if q.question, err = p.Question(); err != nil {
		return q, strange // labels that hold a dot cannot be written as text
	}
	if err := errors.Join(p.SkipAllQuestions(), p.SkipAllAnswers(), p.SkipAllAuthorities()); err != nil {
		return q, malformed
	}
	if problem := q.readAdditional(&p); problem != fine {
		return q, problem
	}
	q.host = mesh.Host(strings.TrimSuffix(lower(q.question.Name.String()), "."))
	return q, fine
}

// readAdditional reads the additional records, of which it wants one OPT.
// Others are strange: a signature would have to be answered with one.
func (q *query) readAdditional(p *dnsmessage.Parser) problem {
	for {
		h, err := p.AdditionalHeader()
		switch {
		case errors.Is(err, dnsmessage.ErrSectionDone):
			return fine
		case err != nil:
			return malformed
		case h.Type != dnsmessage.TypeOPT:
			return strange
		case q.edns:
			return malformed // RFC 6891, section 6.1.1
		case h.TTL>>16&0xff != 0:
			return strange // a later version, which its resolver may know
		}
		q.edns, q.udpSize, q.dnssecOK = true, max(minUDP, int(h.Class)), h.DNSSECAllowed()
		if p.SkipAdditional() != nil {
			return malformed
		}
	}
}

// lower folds the case of ASCII letters only (RFC 4343).
func lower(s string) string {
	return string(foldCase([]byte(s)))
}

func foldCase(b []byte) []byte {
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return b
}

// questionEnd returns where the first question of msg ends, and false if it
// has none that is well-formed. A first name cannot be compressed: there is
// nothing before it that it could point to.
func questionEnd(msg []byte) (int, bool) {
	at := headerSize
	for {
		if at >= len(msg) {
			return 0, false
		}
		n := int(msg[at])
		at++
		if n == 0 {
			break
		}
		at += n
		if n > 63 || at-headerSize > 254 { // RFC 1035, section 2.3.4
			return 0, false
		}
	}
	at += 4
	return at, at <= len(msg)
}

// answer appends the reply with addrs to b. If they do not fit in limit bytes,
// as many as fit are in it, and it says that there are more.
func answer(b []byte, q query, addrs []netip.Addr, limit int) ([]byte, error) {
	// An address takes 16 bytes, an IPv6 one 28: compressed name, type, class,
	// TTL, length and itself.
	for n := min(len(addrs), limit/16); ; {
		out, err := build(b, q, addrs[:n], n < len(addrs))
		if err != nil || len(out) <= limit || n == 0 {
			return out, err
		}
		n = max(0, n-1-(len(out)-limit)/28)
	}
}

// build appends a reply to b.
func build(b []byte, q query, addrs []netip.Addr, truncated bool) ([]byte, error) {
	m := dnsmessage.NewBuilder(b, dnsmessage.Header{
		ID: q.header.ID, Response: true, Authoritative: true, Truncated: truncated,
		RecursionDesired: q.header.RecursionDesired, RecursionAvailable: true, CheckingDisabled: q.header.CheckingDisabled,
	})
	m.EnableCompression()
	errs := []error{m.StartQuestions(), m.Question(q.question), m.StartAnswers()}
	for _, a := range addrs {
		h := dnsmessage.ResourceHeader{Name: q.question.Name, Class: q.class, TTL: TTL}
		if a.Is4() {
			errs = append(errs, m.AResource(h, dnsmessage.AResource{A: a.As4()}))
		} else {
			errs = append(errs, m.AAAAResource(h, dnsmessage.AAAAResource{AAAA: a.As16()}))
		}
	}
	if q.edns { // and says again what the query says of DNSSEC (RFC 3225, section 3)
		var h dnsmessage.ResourceHeader
		errs = append(errs, m.StartAdditionals(), h.SetEDNS0(maxUDP, dnsmessage.RCodeSuccess, q.dnssecOK), m.OPTResource(h, dnsmessage.OPTResource{}))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return m.Finish()
}

const (
	maxTCP = 65535 // as much as its length can say (RFC 1035, section 4.2.2)
	maxUDP = 4096  // of a reply over UDP, whatever the client takes
)

// failure appends a reply to msg that only has a code, the question if there is
// one, and an OPT record if msg has one that can be read: without it the client
// would take us for a server that does not know them (RFC 6891, section 7). msg
// has at least a header.
func failure(b, msg []byte, code dnsmessage.RCode) []byte {
	end, ok := questionEnd(msg)
	if !ok || binary.BigEndian.Uint16(msg[4:]) != 1 {
		end = headerSize
	}
	b = append(b, msg[:end]...)
	b[2] = bitResponse | msg[2]&(maskOpcode|bitRecursion)
	b[3] = bitAvailable | byte(code)&maskRCode
	clear(b[4:headerSize])
	if end > headerSize {
		b[5] = 1
	}
	if q, problem := parse(msg); q.edns && problem != malformed {
		b[11] = 1
		b = append(b, 0, 0, byte(dnsmessage.TypeOPT), maxUDP>>8, maxUDP&0xff, 0, 0, 0, 0, 0, 0)
		if q.dnssecOK {
			b[len(b)-4] = 0x80
		}
	}
	return b
}

// Failure returns the reply to a query that could not be sent on, or nil if
// msg is not a query.
func Failure(msg []byte) []byte {
	if len(msg) < headerSize || msg[2]&bitResponse != 0 {
		return nil
	}
	return failure(nil, msg, dnsmessage.RCodeServerFailure)
}

// Answers reports whether reply can be the answer to query: its ID and its
// question are the query's. Everything else about who sent it is for the
// caller to see to.
func Answers(query, reply []byte) bool {
	if len(query) < headerSize || len(reply) < headerSize || !bytes.Equal(query[:2], reply[:2]) ||
		reply[2]&bitResponse == 0 || (query[2]^reply[2])&maskOpcode != 0 {
		return false
	}
	end, ok := questionEnd(query)
	if !ok || binary.BigEndian.Uint16(query[4:]) == 0 {
		return query[2]&maskOpcode != 0 // has none to compare
	}
	if binary.BigEndian.Uint16(reply[4:]) == 0 {
		// A server that could not read the question does not repeat it.
		return len(reply) == headerSize && reply[3]&maskRCode == byte(dnsmessage.RCodeFormatError)
	}
	theirs, ok := questionEnd(reply)
	// Some servers change the case of letters. The client that depends on it
	// looks itself.
	return ok && theirs == end && sameName(query[headerSize:end-4], reply[headerSize:end-4]) && bytes.Equal(query[end-4:end], reply[end-4:end])
}

// sameName compares names on the wire, but for the case of ASCII letters. No
// length of a label is one.
func sameName(a, b []byte) bool {
	return bytes.Equal(foldCase(bytes.Clone(a)), foldCase(bytes.Clone(b)))
}

// Streams reports whether the answer to query may be more than one message
// over TCP, or is not known to be one: a zone transfer, an update.
func Streams(query []byte) bool {
	q, problem := parse(query)
	return problem != fine && problem != malformed || q.kind == dnsmessage.TypeAXFR || q.kind == typeIXFR
}

const typeIXFR dnsmessage.Type = 251

// typeName returns the word for a type that metrics have, or "other": clients
// must not be able to make more of them.
func typeName(t dnsmessage.Type) string {
	switch t {
	case dnsmessage.TypeA:
		return "a"
	case dnsmessage.TypeAAAA:
		return "aaaa"
	case dnsmessage.TypeCNAME:
		return "cname"
	case dnsmessage.TypeMX:
		return "mx"
	case dnsmessage.TypeNS:
		return "ns"
	case dnsmessage.TypePTR:
		return "ptr"
	case dnsmessage.TypeSOA:
		return "soa"
	case dnsmessage.TypeSRV:
		return "srv"
	case dnsmessage.TypeTXT:
		return "txt"
	case dnsmessage.TypeALL:
		return "any"
	case typeSVCB:
		return "svcb"
	case typeHTTPS:
		return "https"
	}
	return "other"
}
