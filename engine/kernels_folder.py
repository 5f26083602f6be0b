"""`import kernels` beside the package of Hugging Face that has the same name, and that transformers looks for.

Our kernels/ has no __init__.py: installing it overwrites no file of theirs, and where both are there `import kernels`
is theirs. Their modules and ours have different names, so both fit under the one package.
"""

import sys
from pathlib import Path


def join(folder: Path) -> None:
    """Let `import kernels.NAME` find the modules of `folder` first, whichever package is called kernels here.

    Raises ImportError where a program has already imported another module under one of our names.
    """
    import kernels

    for file in folder.glob("*.py"):
        name = f"kernels.{file.stem}"
        found = getattr(sys.modules.get(name), "__file__", None)
        if found is not None and Path(found).resolve() != file:
            raise ImportError(f"{name}: got {found}, expected {file}: the program imported another package kernels")
    kernels.__path__ = [str(folder), *(place for place in kernels.__path__ if place != str(folder))]
    # transformers 5.0 to 5.11 compare this with the version that they need, and fail where there is none.
    vars(kernels).setdefault("__version__", "0")
