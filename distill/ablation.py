"""The command's former place: distill/experiments/ablation.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("distill.experiments.ablation", run_name="__main__")
