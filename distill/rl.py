"""The command's former place: distill/stages/rl.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("distill.stages.rl", run_name="__main__")
