package compile

func (w *World) compileVirtualServices(in []VirtualService) {}
