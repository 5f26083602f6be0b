"""Small timings for regressions: `pytest bench/micro --benchmark-json=FILE`, then `python -m bench diff OLD NEW`."""
