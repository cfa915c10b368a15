package l7

import "bytes"

// normalizePath returns a request's path (and its query, which it leaves alone)
// in the one form in which it is matched, authorized and forwarded, so that no
// two of them can understand it differently. It returns false for a path that
// servers understand in different ways: it is to be refused.
//
//   - Percent-encoded letters, digits and "-._~" are decoded, and the digits of
//     other encodings written in upper case (RFC 3986 6.2.2.1, 6.2.2.2).
//   - Slashes in a row are one; segments "." and ".." are resolved (5.2.4).
//   - %2F and %5C stay as they are: some applications have them in names. But
//     they are refused where a server that decodes them would find a dot
//     segment; and unslashed tells policies what such a server would see.
//   - %00, a broken encoding, a byte that no target may have (a backslash, a
//     control character, "#"), and dot segments with parameters ("..;x", which
//     some servers resolve) are refused.
//
// The result is path itself if it is normalized already, else it is in scratch.
// "*" and the empty path are those of OPTIONS and CONNECT.
func normalizePath(path, scratch []byte) (clean []byte, ok bool) {
	if len(path) == 0 || len(path) == 1 && path[0] == '*' {
		return path, true
	}
	if path[0] != '/' {
		return nil, false
	}
	end, tidy := len(path), true
	for i, c := range path {
		if !inTarget[c] {
			return nil, false
		}
		if c == '?' {
			end = i
			break
		}
		if c == '%' || i > 0 && path[i-1] == '/' && (c == '/' || c == '.') {
			tidy = false
		}
	}
	for _, c := range path[end:] {
		if !inTarget[c] {
			return nil, false
		}
	}
	if tidy {
		return path, true
	}
	clean, ok = resolve(path[1:end], append(scratch[:0], '/'))
	return append(clean, path[end:]...), ok
}

// resolve appends the segments of rest to out, which ends with a slash.
func resolve(rest, out []byte) ([]byte, bool) {
	for more := true; more; {
		var segment []byte
		segment, rest, more = bytes.Cut(rest, []byte{'/'})
		from := len(out)
		var ok bool
		if out, ok = appendDecoded(out, segment); !ok || hidesDots(out[from:]) {
			return nil, false
		}
		switch string(out[from:]) {
		case "", ".":
			out = out[:from]
		case "..":
			out = out[:max(bytes.LastIndexByte(out[:from-1], '/')+1, 1)]
		default:
			if more {
				out = append(out, '/')
			}
		}
	}
	return out, true
}

// appendDecoded appends a segment with the encodings decoded that mean nothing.
func appendDecoded(out, segment []byte) ([]byte, bool) {
	for i := 0; i < len(segment); i++ {
		c := segment[i]
		if c != '%' {
			out = append(out, c)
			continue
		}
		if i+2 >= len(segment) {
			return nil, false
		}
		high, low := unhex(segment[i+1]), unhex(segment[i+2])
		if high > 15 || low > 15 || high|low == 0 {
			return nil, false
		}
		i += 2
		if c = high<<4 | low; unreserved[c] {
			out = append(out, c)
			continue
		}
		out = append(out, '%', hexDigits[high], hexDigits[low])
	}
	return out, true
}

// hidesDots reports whether some server would find a dot segment in a segment
// that is none: after it has decoded %2F or %5C, or cut off parameters.
func hidesDots(segment []byte) bool {
	for part, more := segment, true; more; {
		var next []byte
		at := escapedSlash(part)
		if more = at >= 0; more {
			part, next = part[:at], part[at+3:]
		}
		name, _, parameters := bytes.Cut(part, []byte{';'})
		if dots := string(name) == "." || string(name) == ".."; dots && (parameters || len(part) != len(segment)) {
			return true
		}
		part = next
	}
	return false
}

// escapedSlash returns where the first %2F or %5C of a normalized path is, or
// -1.
func escapedSlash(path []byte) int {
	for i := 0; i+2 < len(path); i++ {
		if path[i] == '%' && (path[i+1] == '2' && path[i+2] == 'F' || path[i+1] == '5' && path[i+2] == 'C') {
			return i
		}
	}
	return -1
}

// unslashed returns a normalized path, without its query, as a server sees it
// that takes %2F and %5C for slashes: nil if it is the same. The result is in
// scratch.
func unslashed(path, scratch []byte) []byte {
	at := escapedSlash(path)
	if at < 0 {
		return nil
	}
	out := scratch[:0]
	for ; at >= 0; at = escapedSlash(path) {
		out = append(out, path[:at]...)
		out = append(out, '/')
		path = path[at+3:]
	}
	out = append(out, path...)
	end := 0
	for i, c := range out { // slashes in a row
		if c == '/' && i > 0 && out[end-1] == '/' {
			continue
		}
		out[end] = c
		end++
	}
	return out[:end]
}

const hexDigits = "0123456789ABCDEF"

// unhex returns the value of a hexadecimal digit, or more than 15.
func unhex(c byte) byte {
	switch {
	case '0' <= c && c <= '9':
		return c - '0'
	case 'a' <= c && c <= 'f':
		return c - 'a' + 10
	case 'A' <= c && c <= 'F':
		return c - 'A' + 10
	}
	return 0xff
}

// The tables of paths are read only.
var (
	unreserved = bytesWhere(func(c byte) bool {
		return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '-' || c == '.' || c == '_' || c == '~'
	})
	// inTarget are the bytes that a request target may have (RFC 3986).
	inTarget = bytesWhere(func(c byte) bool {
		return c > 0x20 && c < 0x7f && !bytes.ContainsRune([]byte("#\"<>\\^`{|}"), rune(c))
	})
)

func bytesWhere(f func(byte) bool) (t [256]bool) {
	for c := range t {
		t[c] = f(byte(c))
	}
	return t
}
