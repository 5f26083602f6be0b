"""Runs the functions of a file one after the other, in every process of a launch, in one process group.

    torchrun --nproc_per_node 2 tests/support/in_processes.py JOBS

JOBS is a pickled list of (name, function, arguments). The output of a function in process N goes to JOBS.NAME.N.
"""

import contextlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


def main(jobs: Path) -> None:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for name, function, arguments in pickle.loads(jobs.read_bytes()):
        with Path(f"{jobs}.{name}.{rank}").open("w") as printed, contextlib.redirect_stdout(printed):
            function(*arguments)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def with_accelerator(function: Callable[..., object], *arguments: object) -> None:
    """Call function(*arguments, Accelerator)."""
    from accelerate import Accelerator

    function(*arguments, Accelerator(cpu=True))


def sharding_frees_what_it_gathered() -> None:
    """After a forward pass without gradients (teacher, rollout) the processes hold only the shards."""
    from distill.training.sharding import shard_frozen

    torch.manual_seed(0)  # gives all processes the same weights
    model, other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8).requires_grad_(False)
    model[0].requires_grad_(False)
    whole = other.weight.clone()
    assert shard_frozen(model, [other], "cpu") == 2
    assert other.weight.to_local().shape == (4, 8)
    assert not hasattr(model[1].weight, "to_local")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x = torch.eye(8)
            torch.testing.assert_close(other(x) - other.bias.full_tensor(), whole.T)
            model(x)
        for layer in (other, model[0]):
            for group in layer._get_fsdp_state()._fsdp_param_group.fsdp_params:
                assert group._unsharded_param.untyped_storage().size() == 0
    model(torch.eye(8)).sum().backward()
    assert model[0].weight.grad is None
    assert model[1].weight.grad is not None
    print("freed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
