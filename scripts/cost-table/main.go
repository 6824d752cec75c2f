// Measures what one defer costs on this machine, per mechanism: registering and running an empty
// deferred function, minus calling that function directly in code of the same shape.
//
// Every pair below differs in the word defer alone. Each function is timed in many short rounds,
// the two of a pair in turn, and the fastest round of each counts: what is slower was disturbed.
package main

import (
	"fmt"
	"os"
	"runtime"
	"strings"
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
	rounds = 1000
	calls  = 20000
)

// The time of one call in the fastest round so far, in ns.
func faster(best float64, f func(int), n int) float64 {
	start := time.Now()
	for i := 0; i < calls; i++ {
		f(n)
	}
	took := float64(time.Since(start).Nanoseconds()) / calls
	if best == 0 || took < best {
		return took
	}
	return best
}

func main() {
	var fields []string
	for _, p := range pairs {
		var with, directly float64
		for r := 0; r < rounds; r++ {
			with = faster(with, p.with, p.defers)
			directly = faster(directly, p.directly, p.defers)
		}
		key := p.mechanism
		if p.defers > 1 {
			key = fmt.Sprintf("%s x%d", p.mechanism, p.defers)
		}
		fields = append(fields, fmt.Sprintf("%q: %.2f", key, (with-directly)/float64(p.defers)))
	}
	fmt.Printf("{\"toolchain\": %q, \"arch\": %q, %s}\n", runtime.Version(), runtime.GOARCH, strings.Join(fields, ", "))
}
