//go:build go1.23
// +build go1.23

package main

func init() {
	pairs = append(pairs,
		pair{"range-func", 1, rangeFunc, rangeFuncDirect, calls, nil, false},
		pair{"range-func", 8, rangeFunc, rangeFuncDirect, calls, nil, false})
}

type sequence int

//go:noinline
func (n sequence) all(yield func(int) bool) {
	for i := 0; i < int(n); i++ {
		if !yield(i) {
			return
		}
	}
}

//go:noinline
func rangeFunc(n int) {
	for range sequence(n).all {
		defer deferred()
	}
	body()
}

//go:noinline
func rangeFuncDirect(n int) {
	for range sequence(n).all {
		deferred()
	}
	body()
}
