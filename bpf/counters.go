package bpf

// Counters returns the keys of the stats map.
func Counters() []CaptureCounter {
	var out []CaptureCounter
	for c := CaptureCounter(0); c.String() != ""; c++ {
		out = append(out, c)
	}
	return out
}

// String returns the name of the counter in metrics: what was counted, and for
// drops the reason. It is empty for a key that is not in use.
func (c CaptureCounter) String() string {
	switch c {
	case CaptureCounterCAPTURED_OUT:
		return "captured_out"
	case CaptureCounterCAPTURED_IN:
		return "captured_in"
	case CaptureCounterCAPTURED_HBONE:
		return "captured_hbone"
	case CaptureCounterPROBE_IN:
		return "probe_in"
	case CaptureCounterOUT_NO_PROXY_DROP:
		return "out_no_proxy_drop"
	case CaptureCounterIN_NO_PROXY_DROP:
		return "in_no_proxy_drop"
	case CaptureCounterIN_UNKNOWN_SOCKET_DROP:
		return "in_unknown_socket_drop"
	case CaptureCounterIN_UNKNOWN_ADDR_DROP:
		return "in_unknown_addr_drop"
	case CaptureCounterIN_FRAGMENT_DROP:
		return "in_fragment_drop"
	case CaptureCounterIN_MALFORMED_DROP:
		return "in_malformed_drop"
	case CaptureCounterPOD_GUARD_SYN_DROP:
		return "pod_guard_syn_drop"
	case CaptureCounterPOD_GUARD_DATA_DROP:
		return "pod_guard_data_drop"
	case CaptureCounterPOD_GUARD_MALFORMED_DROP:
		return "pod_guard_malformed_drop"
	case CaptureCounterHOST_GUARD_SYN_DROP:
		return "host_guard_syn_drop"
	case CaptureCounterHOST_GUARD_DATA_DROP:
		return "host_guard_data_drop"
	case CaptureCounterHOST_GUARD_MALFORMED_DROP:
		return "host_guard_malformed_drop"
	case CaptureCounterSTRAY_DROP:
		return "stray_drop"
	case CaptureCounterCAPTURED_DNS:
		return "captured_dns"
	case CaptureCounterDNS_NO_PROXY_DROP:
		return "dns_no_proxy_drop"
	case CaptureCounterLOOP_DROP:
		return "loop_drop"
	}
	return ""
}
