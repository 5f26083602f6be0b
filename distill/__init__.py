"""Data, teacher, student, scores: `python -m distill STAGE`. Trains the models of `engine` and never forks them."""

import engine  # noqa: F401  before torch: the engine says how idle threads wait (engine/threads.py)
