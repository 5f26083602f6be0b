"""The command's former place: distill/stages/sample_teacher.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("distill.stages.sample_teacher", run_name="__main__")
