// Command weft-cni is Weft's CNI plugin. The weft-node agent installs it on
// every node as the last plugin of the node's chain; nobody calls it by hand.
package main

import (
	"os"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/weft-mesh/weft/node/cni"
)

func main() {
	skel.PluginMainFuncs(cni.Plugin{Out: os.Stdout}.Funcs(), cni.Versions(),
		"weft-cni brings pods into the Weft mesh before they start")
}
