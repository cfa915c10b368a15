// Package meshv1 is the wire of what only proxies of requests know, generated
// from the .proto file beside it. Translate with api/feed; nothing else should
// read these types.
package meshv1

//go:generate sh ../generate.sh meshv1
