"""One operation per file: PyTorch reference, kernels, checked wrapper. `table` chooses. Needs torch, triton."""
