"""Makes a bundle of the engine's modules, which then runs without them."""

import engine  # noqa: F401  before torch: the engine says how idle threads wait (engine/threads.py)
