// Package conformance tests whether a server speaks HBONE as docs/hbone.md
// specifies it. It plays a client, honest and otherwise, and judges the answers;
// it shares no code with our own tunnel but the record layer that one check
// needs, so that both cannot be wrong in the same way.
package conformance
