package l7

// work is what the engine itself remembers of an exchange while it runs.
type work struct {
	reached int // filters whose OnRequest ran
}
