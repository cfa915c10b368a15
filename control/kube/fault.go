package kube

import (
	"errors"
	"maps"
	"slices"
	"sync"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/weft-mesh/weft/control/compile"
	"github.com/weft-mesh/weft/mesh"
)

// errTaken says that an object of somebody else has the name.
var errTaken = errors.New("it is left alone; rename one of them")

// A fault is why the proxies of a Gateway cannot be run as they should be, when
// the user can mend it.
type fault struct {
	parameters bool // what the Gateway asks for is refused by the API server
	why        string
}

// faultOf reads err. It reports false for an error that passes by itself.
func faultOf(err error) (fault, bool) {
	switch {
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err):
		return fault{true, "spec.infrastructure: " + err.Error()}, true
	case apierrors.IsForbidden(err), errors.Is(err, errTaken):
		return fault{false, err.Error()}, true
	}
	return fault{}, false
}

// faults are those of all Gateways, for who says so in their statuses.
type faults struct {
	mu sync.Mutex
	of map[mesh.Name]fault
}

// set replaces all and reports whether that changes anything.
func (f *faults) set(of map[mesh.Name]fault) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if maps.Equal(f.of, of) {
		return false
	}
	f.of = of
	return true
}

// tell puts the faults into the statuses of their Gateways.
func (f *faults) tell(statuses []compile.Status) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, x := range f.of {
		if x.parameters {
			refuse(statuses, name, errors.New(x.why))
		} else {
			condition(statuses, name, compile.Programmed, string(gatewayv1.GatewayReasonInvalid), x.why)
		}
	}
}

// refuse says in the status of a Gateway that it is not accepted, and why.
func refuse(statuses []compile.Status, gateway mesh.Name, why error) {
	condition(statuses, gateway, compile.Accepted, string(gatewayv1.GatewayReasonInvalidParameters), why.Error())
}

// condition makes a condition of a Gateway's status false.
func condition(statuses []compile.Status, gateway mesh.Name, typ, reason, message string) {
	i := slices.IndexFunc(statuses, func(s compile.Status) bool { return s.Kind == compile.KindGateway && s.Name == gateway })
	if i < 0 {
		return
	}
	for c := range statuses[i].Conditions {
		if cond := &statuses[i].Conditions[c]; cond.Type == typ {
			cond.OK, cond.Reason, cond.Message = false, reason, message
		}
	}
}
