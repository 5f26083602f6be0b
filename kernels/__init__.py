"""One operation per file: a PyTorch reference, the implementations, one checked wrapper. Knows only torch."""
