package l7

// sanitize takes out what a client may not say.
type sanitize struct{ Pass }

// authorize asks the policies.
type authorize struct{ e *Engine }

func (*authorize) OnRequest(x *Exchange) Verdict { return Continue }
func (*authorize) OnResponse(x *Exchange)        {}
func (*authorize) OnEnd(x *Exchange)             {}

// match finds the rule.
type match struct{ e *Engine }

func (*match) OnRequest(x *Exchange) Verdict { return Continue }
func (*match) OnResponse(x *Exchange)        {}
func (*match) OnEnd(x *Exchange)             {}
