// Package obs shows a process to the people who run it: its log, its metrics
// and its debug pages.
package obs
