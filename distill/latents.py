"""The command's former place: distill/stages/latents.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("distill.stages.latents", run_name="__main__")
