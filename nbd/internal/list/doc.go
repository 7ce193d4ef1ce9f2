// Package list provides lists that lead through their elements. Adding one takes no
// memory and cannot fail, so a list of what waits needs no bound of its own: its
// elements have one.
//
// An element has a [Link] for each list that it may be in at the same time, and gives
// it to the [List]:
//
//	type slot struct {
//		waiting list.Link[slot]
//	}
//	var waiting list.List[slot]
//	waiting.Push(&s.waiting, s)
//
// Nothing here is safe for use by several goroutines at once; a list has the owner that
// its elements have.
package list
