"""The command's former place: distill/experiments/gallery.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("distill.experiments.gallery", run_name="__main__")
