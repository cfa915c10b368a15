//go:build !race

package l7

const raceDetector = false
