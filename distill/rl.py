"""The former name of `python -m distill rl`, kept for one release."""

import sys

from distill.__main__ import former

if __name__ == "__main__":
    sys.exit(former("rl"))
