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
	"runtime/debug"
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

// Heap: n defers in a loop, all served by the pool if they are at most 32.

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

// The same, with the time from the last statement on: what the return costs.

var registered time.Time

//go:noinline
func heapReturn(n int) {
	for i := 0; i < n; i++ {
		defer deferred()
	}
	registered = time.Now()
}

//go:noinline
func heapReturnDirect(n int) {
	registered = time.Now()
	for i := 0; i < n; i++ {
		deferred()
	}
}

type pair struct {
	mechanism      string
	defers         int
	with, directly func(int)
	calls          int
	before         func()
	sinceMark      bool
}

const (
	rounds = 200
	calls  = 20000

	// As a P's pool holds 32 records and moves 16 at a time, 256 defers at once take 32 records from it
	// and the rest from the central pool, in 14 refills, or, if that is empty, from the heap: 224
	// misses. At the return 14 spills take back what the local pool cannot hold.
	many = 256
)

var pairs = []pair{
	{"open-coded", 1, openCoded, openCodedDirect, calls, nil, false},
	{"stack", 1, stack, stackDirect, calls, nil, false},
	{"heap", 1, heap, heapDirect, calls, nil, false},
	{"heap", 8, heap, heapDirect, calls, nil, false},
	{"heap return", 16, heapReturn, heapReturnDirect, 1, nil, true},
	{"heap", many, heap, heapDirect, calls / many, nil, false},
	// A collection empties the central pool. Without one in between, as collections are off.
	{"heap after collection", many, heap, heapDirect, 1, runtime.GC, false},
}

// The time of one call in ns: the mean of a round.
func round(f func(int), p pair) float64 {
	if p.before != nil {
		p.before()
	}
	start := time.Now()
	for i := 0; i < p.calls; i++ {
		f(p.defers)
	}
	if p.sinceMark {
		start = registered
	}
	return float64(time.Since(start).Nanoseconds()) / float64(p.calls)
}

func main() {
	debug.SetGCPercent(-1)
	// One local pool.
	runtime.GOMAXPROCS(1)
	type best struct{ with, directly float64 }
	fastest := make([]best, len(pairs))
	for r := 0; r < rounds; r++ {
		for i, p := range pairs {
			with, directly := round(p.with, p), round(p.directly, p)
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
