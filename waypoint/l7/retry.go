package l7

import (
	"time"

	"github.com/weft-mesh/weft/mesh"
	"github.com/weft-mesh/weft/waypoint/l7/msg"
)

// retriable reports whether r asks for another try after a failure of that
// kind. It is not asked how many there were.
func retriable(r *mesh.Retry, kind failed, grpc bool) bool {
	if r == nil {
		return false
	}
	for _, on := range r.On {
		switch on {
		case "5xx", "gateway-error", "reset":
			switch kind {
			case failedConnect, failedClosed, failedReset, failedRefused, failedProtocol, failedTry, failedOther:
				return true
			}
		case "reset-before-request":
			if kind == failedConnect || kind == failedRefused {
				return true
			}
		case "refused-stream":
			if kind == failedRefused {
				return true
			}
		case "connect-failure":
			if kind == failedConnect {
				return true
			}
		case "unavailable":
			// What gRPC clients would call unavailable, when it never was at a
			// server.
			if grpc && (kind == failedConnect || kind == failedRefused) {
				return true
			}
		}
	}
	return false
}

// retriableAnswer reports whether r asks for another try after an answer.
func retriableAnswer(r *mesh.Retry, h *msg.Head) bool {
	if r == nil || h.Status < 300 && !h.Has(msg.GRPCStatus) {
		return false
	}
	status := h.Status
	code := string(h.Get(msg.GRPCStatus))
	for _, on := range r.On {
		switch on {
		case "5xx":
			if status >= 500 {
				return true
			}
		case "gateway-error":
			if status >= 502 && status <= 504 {
				return true
			}
		case "retriable-4xx":
			if status == 409 {
				return true
			}
		case "retriable-status-codes":
			for _, c := range r.Codes {
				if c == status {
					return true
				}
			}
		case "cancelled":
			if code == "1" {
				return true
			}
		case "deadline-exceeded":
			if code == "4" {
				return true
			}
		case "resource-exhausted":
			if code == "8" {
				return true
			}
		case "internal":
			if code == "13" {
				return true
			}
		case "unavailable":
			if code == "14" {
				return true
			}
		}
	}
	return false
}

// backoff returns how long to wait before the n-th try after the first: by
// chance up to (2^n - 1) times the base, and to the maximum.
func backoff(r *mesh.Retry, n int, chance uint64) time.Duration {
	base := time.Duration(r.Backoff)
	if base <= 0 {
		base = 25 * time.Millisecond
	}
	most := time.Duration(r.MaxBackoff)
	if most <= 0 {
		most = 10 * base
	}
	d := most
	if n < 30 {
		if up := base * time.Duration(1<<n-1); up > 0 && up < most {
			d = up
		}
	}
	return time.Duration(chance % uint64(d))
}

// idempotent reports whether a request may be sent again although the server
// may have seen it (RFC 9110 9.2.2).
func idempotent(method []byte) bool {
	switch string(method) {
	case "GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE":
		return true
	}
	return false
}
