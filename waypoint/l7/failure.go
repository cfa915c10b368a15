package l7

import (
	"errors"
	"fmt"
)

// failed is in which way a try went wrong.
type failed uint8

const (
	failedOther     failed = iota
	failedNoCluster        // there is no such service or subset
	failedNoHealthy        // no endpoint may take it
	failedOverflow         // a circuit breaker is open
	failedConnect          // no connection
	failedClosed           // the connection ended before an answer
	failedReset            // the stream was reset before an answer
	failedRefused          // the stream was refused: nothing was processed
	failedProtocol         // what came is not an answer
	failedTimeout          // the route's timeout
	failedTry              // the try's timeout
	failedIdle             // nothing moved for too long
	failedClient           // the client left, or the rest of its request did not come
	failedRequest          // the rest of the request is malformed
	failedStopped          // the engine stops
	failedStatus           // an answer that is to be tried again
)

// A tryError is a try that has failed.
type tryError struct {
	kind  failed
	cause error
}

// Error says what happened.
func (e *tryError) Error() string {
	if e.cause == nil {
		return outcomes[e.kind].details
	}
	return fmt.Sprintf("%s: %v", outcomes[e.kind].details, e.cause)
}

// Unwrap returns the cause.
func (e *tryError) Unwrap() error { return e.cause }

// kindOf returns what an error of a try means, and otherwise if it does not say
// so itself.
func kindOf(err error, otherwise failed) *tryError {
	var t *tryError
	if errors.As(err, &t) {
		return t
	}
	return &tryError{kind: otherwise, cause: err}
}

// errOverflow is that no more connections may be opened.
var errOverflow = &tryError{kind: failedOverflow}

// An outcome is what the client, the log and the metrics are told.
type outcome struct {
	status  int
	flag    Flags
	details string
	body    string
}

const resetBody = "upstream connect error or disconnect/reset before headers. reset reason: "

// outcomes are those of each kind of failure, in the words that people search
// for. It is read only.
var outcomes = [...]outcome{
	failedOther:     {503, FlagLocalReset, "upstream_reset_before_response_started{local_reset}", resetBody + "local reset"},
	failedNoCluster: {503, FlagNoCluster, "cluster_not_found", ""},
	failedNoHealthy: {503, FlagNoHealthy, "no_healthy_upstream", "no healthy upstream"},
	failedOverflow:  {503, FlagOverflow, "upstream_reset_before_response_started{overflow}", resetBody + "overflow"},
	failedConnect:   {503, FlagConnectFailed, "upstream_reset_before_response_started{connection_failure}", resetBody + "connection failure"},
	failedClosed:    {503, FlagUpstreamClosed, "upstream_reset_before_response_started{connection_termination}", resetBody + "connection termination"},
	failedReset:     {503, FlagUpstreamReset, "upstream_reset_before_response_started{remote_reset}", resetBody + "remote reset"},
	failedRefused:   {503, FlagUpstreamReset, "upstream_reset_before_response_started{remote_refused_stream_reset}", resetBody + "remote refused stream reset"},
	failedProtocol:  {502, FlagUpstreamProtocol, "upstream_reset_before_response_started{protocol_error}", resetBody + "protocol error"},
	failedTimeout:   {504, FlagTimeout, "response_timeout", "upstream request timeout"},
	failedTry:       {504, FlagTimeout, "upstream_per_try_timeout", "upstream request timeout"},
	failedIdle:      {504, FlagIdle, "stream_idle_timeout", "stream timeout"},
	failedClient:    {400, FlagDownstreamClosed, "downstream_remote_disconnect", ""},
	failedRequest:   {400, FlagDownstreamProtocol, "http1.codec_error", ""},
	failedStopped:   {503, FlagLocalReset, "proxy_stopped", "the proxy is stopping"},
	failedStatus:    {503, 0, "via_upstream", ""},
}
