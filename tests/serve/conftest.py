"""Fixtures of the server's tests."""

from serving import served

__all__ = ["served"]
