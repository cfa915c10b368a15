package http2

import "encoding/binary"

// A SettingID names a setting (RFC 9113 6.5.2).
type SettingID uint16

// The settings of RFC 9113. Others are ignored.
const (
	HeaderTableSize      SettingID = 0x1
	EnablePush           SettingID = 0x2
	MaxConcurrentStreams SettingID = 0x3
	InitialWindowSize    SettingID = 0x4
	MaxFrameLen          SettingID = 0x5 // SETTINGS_MAX_FRAME_SIZE
	MaxHeaderListSize    SettingID = 0x6
)

// A Setting is one entry of a SETTINGS frame.
type Setting struct {
	ID    SettingID
	Value uint32
}

// AppendSettings appends a SETTINGS frame.
func AppendSettings(dst []byte, ss ...Setting) []byte {
	dst = AppendHeader(dst, Header{Length: uint32(6 * len(ss)), Type: Settings})
	for _, s := range ss {
		dst = binary.BigEndian.AppendUint16(dst, uint16(s.ID))
		dst = binary.BigEndian.AppendUint32(dst, s.Value)
	}
	return dst
}

// AppendSettingsAck appends the answer to a SETTINGS frame.
func AppendSettingsAck(dst []byte) []byte {
	return AppendHeader(dst, Header{Type: Settings, Flags: Ack})
}

// Peer is what the other end asked of us in its SETTINGS. Start from
// DefaultPeer: the zero Peer allows nothing.
type Peer struct {
	HeaderTable   uint32 // bytes of HPACK table it keeps
	MaxStreams    uint32 // streams we may have open
	StreamWindow  uint32 // what a new stream may send at first
	MaxFrame      uint32 // largest payload it takes
	MaxHeaderList uint32 // largest header list it takes, by the measure of RFC 9113 6.5.2
}

// DefaultPeer holds the values in force until the peer's first SETTINGS
// (RFC 9113 6.5.2), but for MaxStreams, where the RFC has no limit and asks
// every peer to allow at least 100.
func DefaultPeer() Peer {
	return Peer{
		HeaderTable:   DefaultTableLen,
		MaxStreams:    100,
		StreamWindow:  InitialWindow,
		MaxFrame:      MinFrameSize,
		MaxHeaderList: 1<<32 - 1,
	}
}

// Apply takes over the payload of a SETTINGS frame from a server, or else from
// a client. The parser has made sure that it is whole entries. An error is a
// *ConnError, and p is then of no use.
func (p *Peer) Apply(payload []byte, fromServer bool) error {
	for ; len(payload) >= 6; payload = payload[6:] {
		v := binary.BigEndian.Uint32(payload[2:])
		switch SettingID(binary.BigEndian.Uint16(payload)) {
		case HeaderTableSize:
			p.HeaderTable = v
		case EnablePush:
			// 6.5.2: other values than 0 and 1 are an error; a server must not send 1.
			if v > 1 || v == 1 && fromServer {
				return connError(ProtocolError, "SETTINGS_ENABLE_PUSH is %d", v)
			}
		case MaxConcurrentStreams:
			p.MaxStreams = v
		case InitialWindowSize:
			if v > MaxWindow {
				return connError(FlowControlError, "SETTINGS_INITIAL_WINDOW_SIZE is %d", v)
			}
			p.StreamWindow = v
		case MaxFrameLen:
			if v < MinFrameSize || v > MaxFrameSize {
				return connError(ProtocolError, "SETTINGS_MAX_FRAME_SIZE is %d", v)
			}
			p.MaxFrame = v
		case MaxHeaderListSize:
			p.MaxHeaderList = v
		}
	}
	return nil
}
