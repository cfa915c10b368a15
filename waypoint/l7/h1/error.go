package h1

// An Error is a message that is refused. After one, nothing that follows on the
// connection can be trusted: it is closed.
type Error struct {
	Status int    // to answer a request with; a response like it is answered with 502
	Reason string // what is wrong, for logs
}

// Error returns the reason.
func (e *Error) Error() string { return "http/1: " + e.Reason }

// Malformed tells a malformed message from a connection that has failed.
func (e *Error) Malformed() bool { return true }

func bad(reason string) *Error { return &Error{400, reason} }

// The errors are made once: refusing must be cheap, too. They are never
// changed.
var (
	errLine        = bad("malformed request line")
	errStatusLine  = bad("malformed status line")
	errTarget      = bad("request target does not fit the method")
	errLineEnd     = bad("line does not end with CRLF")
	errField       = bad("malformed field line")
	errHost        = bad("missing, repeated or malformed host")
	errMismatch    = bad("host differs from that of the target")
	errLength      = bad("malformed or repeated content-length")
	errCoding      = bad("transfer-encoding is not just chunked")
	errBoth        = bad("both content-length and transfer-encoding")
	errLookalike   = bad("field that looks like one of framing")
	errConnection  = bad("connection nominates a field that is not hop-by-hop")
	errChunk       = bad("malformed chunk")
	errTrailer     = bad("trailers are too large")
	errLongTarget  = &Error{414, "request target is too long"}
	errExpectation = &Error{417, "unknown expectation"}
	errLarge       = &Error{431, "head is too large"}
)
