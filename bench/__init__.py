"""Measurements around the same iterator that users call."""
