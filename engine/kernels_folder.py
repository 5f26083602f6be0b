"""Makes `import kernels` work beside Hugging Face's package of the same name, which transformers looks for.

Our kernels/ has no __init__.py, so installing it overwrites none of their files. If both are installed,
`import kernels` imports theirs. Their modules and ours have different names, so one package can hold both.
"""

import sys
from pathlib import Path


def join(folder: Path) -> None:
    """Let `import kernels.NAME` find the modules of `folder` first, in our package or theirs.

    Raises ImportError if the program has already imported another module under one of our names.
    """
    import kernels

    for file in folder.glob("*.py"):
        name = f"kernels.{file.stem}"
        found = getattr(sys.modules.get(name), "__file__", None)
        if found is not None and Path(found).resolve() != file:
            raise ImportError(f"{name}: got {found}, expected {file}: the program imported another package kernels")
    kernels.__path__ = [str(folder), *(place for place in kernels.__path__ if place != str(folder))]
    # transformers 5.0 to 5.11 compare this with their required version, and fail if it is missing.
    vars(kernels).setdefault("__version__", "0")
