"""Engine modules -> a bundle that runs without them."""

import engine  # noqa: F401  before torch: the engine says how idle threads wait (engine/threads.py)
