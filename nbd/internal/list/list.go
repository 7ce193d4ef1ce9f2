package list

// List is a list in the order of Push. The zero value is empty. Put in the place of a list
// with elements, it forgets them: their links may be pushed again.
type List[T any] struct{ first, last *Link[T] }

// Link is an element's place in a list. The zero value is in none.
type Link[T any] struct {
	prev, next *Link[T]
	element    *T // whose link it is, from the first Push on
}

// Push adds an element, whose link k is, at the end. It must not be in a list by k.
func (l *List[T]) Push(k *Link[T], element *T) {
	k.prev, k.next, k.element = l.last, nil, element
	if l.last != nil {
		l.last.next = k
	} else {
		l.first = k
	}
	l.last = k
}

// Remove takes out the element whose link k is, which must be in l.
func (l *List[T]) Remove(k *Link[T]) {
	if k.prev != nil {
		k.prev.next = k.next
	} else {
		l.first = k.next
	}
	if k.next != nil {
		k.next.prev = k.prev
	} else {
		l.last = k.prev
	}
	k.prev, k.next = nil, nil
}

// Pop takes out the first element; nil when there is none.
func (l *List[T]) Pop() *T {
	k := l.first
	if k == nil {
		return nil
	}
	l.Remove(k)
	return k.element
}

// First is the first element; nil when there is none.
func (l *List[T]) First() *T { return l.first.of() }

// Next is the element after the one whose link k is; nil after the last, and for one
// that is in no list.
func (k *Link[T]) Next() *T { return k.next.of() }

// Prev is the element before the one whose link k is; nil before the first, and for one
// that is in no list.
func (k *Link[T]) Prev() *T { return k.prev.of() }

func (k *Link[T]) of() *T {
	if k == nil {
		return nil
	}
	return k.element
}
