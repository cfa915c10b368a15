package compile

// compileBackendTLS adds BackendTLSPolicies to the traffic policies.
func (w *World) compileBackendTLS(in Inputs) {}
