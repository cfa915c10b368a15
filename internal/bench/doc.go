// Package bench measures proxies: load generators in processes of their own,
// the CPU time that processes use, and figures with their medians, as a table, a
// plot and a JSON file.
package bench
