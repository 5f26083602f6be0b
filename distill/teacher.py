"""The command's former place: distill/stages/teacher.py."""

import runpy

if __name__ == "__main__":
    runpy.run_module("distill.stages.teacher", run_name="__main__")
