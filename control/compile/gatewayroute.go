package compile

// compileGatewayRoutes adds the rules of the routes of the Gateway API.
func (w *World) compileGatewayRoutes(in Inputs) {}
