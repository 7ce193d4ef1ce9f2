package harness

// ParseFio reads the report that fio printed (--output-format=json) of one case that
// somebody else ran, in a container for one.
func ParseFio(text []byte) (Metrics, error) { return parseFio(text) }
