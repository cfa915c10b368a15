package compile

func (w *World) compileDestinationRules(in []DestinationRule) {}
