"""One operation a file: PyTorch reference, kernels, checked wrapper; `table` chooses. Knows torch and triton."""
