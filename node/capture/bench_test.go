package capture

import (
	"testing"

	"github.com/weft-mesh/weft/internal/testnet"
)

// BenchmarkCapture measures what it takes to capture a pod: of a new pod all
// of it stands between the pod and its start; of a running one, the time in
// which its connections are touched is that of Attach.
func BenchmarkCapture(b *testing.B) {
	for name, mode := range map[string]Mode{"new": {New: true}, "running": {Existing: Keep}} {
		b.Run(name, func(b *testing.B) {
			s := newStage(b, testnet.Routed)
			var prepare, attach, detach, total float64
			for b.Loop() {
				at := b.Elapsed()
				p, err := s.capture.Prepare(b.Context(), s.target(), nil)
				if err != nil {
					b.Fatal(err)
				}
				prepared := b.Elapsed()
				if err := p.Attach(b.Context(), mode); err != nil {
					b.Fatal(err)
				}
				attached := b.Elapsed()
				if err := p.Detach(b.Context()); err != nil {
					b.Fatal(err)
				}
				prepare += (prepared - at).Seconds()
				attach += (attached - prepared).Seconds()
				detach += (b.Elapsed() - attached).Seconds()
				total++
				p.Close()
			}
			b.ReportMetric(prepare/total*1e3, "ms/prepare")
			b.ReportMetric(attach/total*1e3, "ms/attach")
			b.ReportMetric(detach/total*1e3, "ms/detach")
		})
	}
}
