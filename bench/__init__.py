"""Measurements around the same iterator that users call."""

import engine  # noqa: F401  before torch: the engine says how idle threads wait (engine/threads.py)
