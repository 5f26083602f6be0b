"""Beside other packages we do no harm: `kernels` is also a package of Hugging Face (engine/kernels_folder.py)."""

import os
import runpy
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch

import engine
from engine.kernels_folder import join

ROOT = Path(__file__).parents[1]
CODE = """
import engine, kernels, sys
from kernels import get_kernel
from kernels.layer import Layer
from kernels.rms_norm import rms_norm
from kernels.solver_step import solver_step
print(kernels.__file__, kernels.__version__, get_kernel(), sys.modules[rms_norm.__module__].__file__)
"""


@pytest.fixture
def theirs(tmp_path):
    """A folder of packages with a package kernels in it, installed as Hugging Face's is."""
    package, about = tmp_path / "kernels", tmp_path / "kernels-0.1.7.dist-info"
    package.mkdir()
    about.mkdir()
    (package / "__init__.py").write_text(
        "from .layer import Layer\n__version__ = '0.1.7'\ndef get_kernel():\n    return 'theirs'\n"
    )
    (package / "layer.py").write_text("class Layer:\n    pass\n")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.1.7\n")
    return tmp_path


def test_transformers_does_not_take_ours_for_theirs():
    if any(found.name == "kernels" for found in distributions()):
        pytest.skip("Hugging Face's kernels is installed here")
    from transformers.integrations import hub_kernels
    from transformers.utils import import_utils

    assert import_utils.is_kernels_available() is False
    assert getattr(hub_kernels, "_kernels_available", False) is False


def test_our_version_is_not_one_of_theirs():
    """Installed, some versions of transformers take our package's version for the one of `kernels`."""
    from transformers.utils import import_utils

    low, high = (getattr(import_utils, f"KERNELS_{end}_VERSION", None) for end in ("MIN", "MAX"))
    if low is None:
        pytest.skip("this transformers compares no versions of kernels")
    from packaging.version import Version

    for name in (engine.__version__, sys.modules["kernels"].__version__):
        assert Version(name) < Version(low) or (high is not None and Version(name) >= Version(high))


def test_models_of_transformers_run_beside_ours():
    from transformers import LlamaConfig, LlamaForCausalLM, UMT5Config, UMT5EncoderModel

    ids = torch.tensor([[1, 2, 3]])
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).eval()
    umt5 = UMT5EncoderModel(UMT5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()
    with torch.no_grad():
        assert llama(ids).logits.shape == (1, 3, 8)
        assert umt5(ids).last_hidden_state.shape == (1, 3, 16)


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
def test_both_packages_live_under_one_name(theirs, first, tmp_path):
    """Whichever stands first in sys.path: theirs is the package, and ours are modules of it."""
    places = [str(theirs), str(ROOT)] if first else [str(ROOT), str(theirs)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = theirs / "kernels" / "__init__.py", "0.1.7", "theirs", ROOT / "kernels" / "rms_norm.py"
    assert done.stdout.split() == [str(part) for part in expected]


def test_another_module_under_one_of_our_names_is_said(tmp_path):
    (tmp_path / "table.py").touch()
    with pytest.raises(ImportError, match=r"kernels.table: got .*table.py, expected .*table.py: the program imported"):
        join(tmp_path)


def test_a_wheel_overwrites_no_file_of_theirs(monkeypatch):
    """Packages of the wheel; kernels/ is one, without the __init__.py that theirs has."""
    import setuptools

    found = {}
    monkeypatch.setenv("GREEDY_NATIVE", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **given: found.update(given))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    assert {"engine", "engine.runtime", "kernels", "bench", "distill", "export"} <= set(found["packages"])
    assert not (ROOT / "kernels" / "__init__.py").exists()
