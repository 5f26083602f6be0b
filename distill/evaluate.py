"""The command's former place: distill/experiments/evaluate.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("distill.experiments.evaluate", run_name="__main__")
