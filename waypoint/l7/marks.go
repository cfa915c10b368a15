package l7

// marks are what filters remember of an exchange from its request until its
// response.
type marks struct {
	origin []byte // that may read the answer, as CORS has found
	cookie []byte // that was made for consistent hashing, nil if none was
	opened bool   // the connection was counted as opened
	// refused is what is to be answered because there is nowhere to send the
	// request to; its status is 0 if there is.
	refused refusal
	// mirrors are those that have yet to get a copy, by their places.
	mirrors uint64
}

// A refusal is an answer without a body.
type refusal struct {
	status  int
	flags   Flags
	details string
}
