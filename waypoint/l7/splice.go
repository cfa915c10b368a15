package l7

// splice lets the kernel move the rest of a body, if it can.
func (e *Engine) splice(x *Exchange, cl client, c call) (*tryError, bool) { return nil, false }
