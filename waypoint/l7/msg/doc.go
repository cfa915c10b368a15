// Package msg holds the head of one HTTP message as the engine sees it,
// whichever version of HTTP it came in and will go out with. It does no I/O
// and checks no syntax: a codec does, before it fills a Head.
package msg
