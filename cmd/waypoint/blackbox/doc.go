// Package blackbox measures waypoints from outside, beside other proxies.
package blackbox
