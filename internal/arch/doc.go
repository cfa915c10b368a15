// Package arch is the map of the house, as a test: which package may import
// which, and where heavy dependencies may live. See ARCHITECTURE.md.
package arch
