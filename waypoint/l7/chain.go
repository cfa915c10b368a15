package l7

// chain returns the filters in the order in which they see a request. They see
// the response, and the end, as Filter says. Before the chain, a codec has
// refused what is malformed or ambiguous, and the engine has normalized the
// path: so no two filters can understand a request differently.
func (e *Engine) chain() []Filter {
	return []Filter{
		// What only the mesh may say of a request is taken out before anybody
		// can believe it.
		sanitize{},
		// Who may not pass learns nothing of routes, and costs nothing more.
		&authorize{e: e},
		// All that follows depends on the rule.
		&match{e: e},
	}
}
