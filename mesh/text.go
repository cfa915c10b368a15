package mesh

import (
	"fmt"
	"slices"
)

// The words of the enumerations, in the order of their values.
func transportWords() []string { return []string{"unset", "plain", "hbone"} }
func actionWords() []string    { return []string{"unset", "allow", "deny"} }
func kindWords() []string {
	return []string{"unset", "exact", "prefix", "suffix", "presence", "template"}
}

// word returns the word for value v, or a text that does not parse.
func word(words []string, what string, v uint8) string {
	if int(v) < len(words) {
		return words[v]
	}
	return fmt.Sprintf("%s(%d)", what, v)
}

// parseWord is the inverse of word. The empty text is the zero value; a word
// of a later version is an error, so that nobody guesses what it meant.
func parseWord(words []string, what string, b []byte) (uint8, error) {
	if len(b) == 0 {
		return 0, nil
	}
	i := slices.Index(words, string(b))
	if i < 0 {
		return 0, fmt.Errorf("parse %s %q: want one of %q", what, b, words)
	}
	return uint8(i), nil
}

// String returns "unset", "plain" or "hbone".
func (t Transport) String() string { return word(transportWords(), "transport", uint8(t)) }

// MarshalText writes String's word.
func (t Transport) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// UnmarshalText reads String's word.
func (t *Transport) UnmarshalText(b []byte) error {
	v, err := parseWord(transportWords(), "transport", b)
	*t = Transport(v)
	return err
}

// String returns "unset", "allow" or "deny".
func (a Action) String() string { return word(actionWords(), "action", uint8(a)) }

// MarshalText writes String's word.
func (a Action) MarshalText() ([]byte, error) { return []byte(a.String()), nil }

// UnmarshalText reads String's word.
func (a *Action) UnmarshalText(b []byte) error {
	v, err := parseWord(actionWords(), "action", b)
	*a = Action(v)
	return err
}

// String returns "unset", "exact", "prefix", "suffix", "presence" or "template".
func (k MatchKind) String() string { return word(kindWords(), "match kind", uint8(k)) }

// MarshalText writes String's word.
func (k MatchKind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads String's word.
func (k *MatchKind) UnmarshalText(b []byte) error {
	v, err := parseWord(kindWords(), "match kind", b)
	*k = MatchKind(v)
	return err
}
