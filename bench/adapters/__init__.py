"""Other engines in the same race, each a process that speaks JSON lines; the protocol is in docs/benchmarks.md."""
