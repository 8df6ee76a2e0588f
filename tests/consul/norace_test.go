//go:build !race

package consul

// raceFlags builds the daemon as the tests are built.
func raceFlags() []string { return nil }
