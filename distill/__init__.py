"""Data, teacher, student training and evaluation. Imports `engine`; never forks its model."""

import engine  # noqa: F401  before torch: the engine says how idle threads wait (engine/threads.py)
