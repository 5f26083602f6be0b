"""The command's former place: distill/stages/next_chunk.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("distill.stages.next_chunk", run_name="__main__")
