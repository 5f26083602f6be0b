"""Other engines in the race. Each is a process that speaks JSON lines; docs/benchmarks.md describes the protocol."""
