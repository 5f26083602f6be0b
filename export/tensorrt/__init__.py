"""Graphs as TensorRT reads them, and plans built from them."""
