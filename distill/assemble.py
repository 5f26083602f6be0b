"""The command's former place: distill/stages/assemble.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("distill.stages.assemble", run_name="__main__")
