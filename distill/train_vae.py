"""The former name of `python -m distill train_vae`, kept for one release."""

import sys

from distill.__main__ import former

if __name__ == "__main__":
    sys.exit(former("train_vae"))
