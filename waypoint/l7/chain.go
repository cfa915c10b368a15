package l7

// chain returns the filters in the order in which they see a request. They see
// the response, and the end, as Filter says. Before the chain, a codec has
// refused what is malformed or ambiguous, and the engine has normalized the
// path: so no two filters can understand a request differently.
func (e *Engine) chain() []Filter {
	filters := []Filter{
		// What only the mesh may say of a request is taken out before anybody
		// can believe it.
		sanitize{},
		// Every answer and every line of the log has the request's name.
		&requestID{e: e},
		// Who may not pass learns nothing of routes, and costs nothing more.
		&authorize{e: e},
		// All that follows depends on the rule.
		&match{e: e},
		// What is edited of a response is edited last, and of answers that the
		// filters below give too.
		edit{},
		// Browsers ask before they ask; a fault would only confuse them.
		cors{},
		// Faults stand for the service, so they are between it and all the rest.
		&fault{e: e},
		direct{},
		// Only what would go to an endpoint fails for want of one.
		routable{},
		// The path and host change for the endpoint only: whatever decides reads
		// those that the client sent.
		rewrite{},
		// The last word before an endpoint is chosen.
		&session{e: e},
		// Copies are of what the endpoint is sent.
		e.mirrors,
		// When all is over it is written down.
		e.access,
	}
	if e.metrics != nil {
		filters = append(filters, e.metrics)
	}
	return filters
}
