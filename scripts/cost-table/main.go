// Measures what one defer costs on this machine, per mechanism: registering and running an empty
// deferred function, minus calling that function directly in code of the same shape.
//
// Every pair below differs in the word defer alone. Each function is timed in many short rounds,
// all in turn, and the fastest round of each counts: what is slower was disturbed.
package main

import (
	"fmt"
	"os"
	"runtime"
	"time"
)

//go:noinline
func deferred() {}

// The body between the statement and the return, so that the deferred call is not at once.
//
//go:noinline
func body() {}

// Never true, and the compiler does not know it.
var never = len(os.Args) > 1000

// Open-coded.

//go:noinline
func openCoded(int) {
	defer deferred()
	body()
}

//go:noinline
func openCodedDirect(int) {
	body()
	deferred()
}

// Stack: the defer in a loop, which never runs, bars open coding.

//go:noinline
func stack(n int) {
	if never {
		for i := 0; i < n; i++ {
			defer deferred()
		}
	}
	defer deferred()
	body()
}

//go:noinline
func stackDirect(n int) {
	if never {
		for i := 0; i < n; i++ {
			deferred()
		}
	}
	body()
	deferred()
}

// Heap: n defers in a loop, all served by the pool.

//go:noinline
func heap(n int) {
	for i := 0; i < n; i++ {
		defer deferred()
	}
	body()
}

//go:noinline
func heapDirect(n int) {
	body()
	for i := 0; i < n; i++ {
		deferred()
	}
}

type pair struct {
	mechanism      string
	defers         int
	with, directly func(int)
}

var pairs = []pair{
	{"open-coded", 1, openCoded, openCodedDirect},
	{"stack", 1, stack, stackDirect},
	{"heap", 1, heap, heapDirect},
	{"heap", 8, heap, heapDirect},
}

const (
	rounds = 200
	calls  = 20000
)

// The time of one call in ns: the mean of a round.
func round(f func(int), n int) float64 {
	start := time.Now()
	for i := 0; i < calls; i++ {
		f(n)
	}
	return float64(time.Since(start).Nanoseconds()) / calls
}

func main() {
	type best struct{ with, directly float64 }
	fastest := make([]best, len(pairs))
	for r := 0; r < rounds; r++ {
		for i, p := range pairs {
			with, directly := round(p.with, p.defers), round(p.directly, p.defers)
			if r == 0 || with < fastest[i].with {
				fastest[i].with = with
			}
			if r == 0 || directly < fastest[i].directly {
				fastest[i].directly = directly
			}
		}
	}
	// Release, GOARCH, mechanism, defers in a call, ns of a call with defer, ns of one without.
	for i, p := range pairs {
		fmt.Printf("%s\t%s\t%s\t%d\t%.2f\t%.2f\n", runtime.Version(), runtime.GOARCH, p.mechanism, p.defers,
			fastest[i].with, fastest[i].directly)
	}
}
