package http2

import "fmt"

// An ErrCode says why a stream or connection ended (RFC 9113 7).
type ErrCode uint32

// The error codes.
const (
	NoError            ErrCode = 0x0
	ProtocolError      ErrCode = 0x1
	InternalError      ErrCode = 0x2
	FlowControlError   ErrCode = 0x3
	SettingsTimeout    ErrCode = 0x4
	StreamClosed       ErrCode = 0x5
	FrameSizeError     ErrCode = 0x6
	RefusedStream      ErrCode = 0x7
	Cancel             ErrCode = 0x8
	CompressionError   ErrCode = 0x9
	ConnectError       ErrCode = 0xa
	EnhanceYourCalm    ErrCode = 0xb
	InadequateSecurity ErrCode = 0xc
	HTTP11Required     ErrCode = 0xd
)

// String returns the name of the code in RFC 9113 7.
func (c ErrCode) String() string {
	names := [...]string{
		"NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT",
		"STREAM_CLOSED", "FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR",
		"CONNECT_ERROR", "ENHANCE_YOUR_CALM", "INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED",
	}
	if int(c) < len(names) {
		return names[c]
	}
	return fmt.Sprintf("error code %#x", uint32(c))
}

// A ConnError ends the whole connection (RFC 9113 5.4.1): its owner sends a
// GOAWAY with the code and closes.
type ConnError struct {
	Code   ErrCode
	Reason string
}

// Error says what the peer did.
func (e *ConnError) Error() string { return fmt.Sprintf("HTTP/2 %v: %s", e.Code, e.Reason) }

// A StreamError ends one stream (RFC 9113 5.4.2): its owner sends a RST_STREAM
// with the code.
type StreamError struct {
	StreamID uint32
	Code     ErrCode
	Reason   string
}

// Error says what went wrong on the stream.
func (e *StreamError) Error() string {
	return fmt.Sprintf("HTTP/2 stream %d: %v: %s", e.StreamID, e.Code, e.Reason)
}

func connError(code ErrCode, format string, args ...any) error {
	return &ConnError{Code: code, Reason: fmt.Sprintf(format, args...)}
}
