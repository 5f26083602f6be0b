"""The command's former place: distill/stages/train_vae.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("distill.stages.train_vae", run_name="__main__")
