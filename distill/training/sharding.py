"""Frozen weights spread over the processes (FSDP2), for teachers that do not fit one device beside their students.

Only frozen Linear layers are sharded, each gathered while it is called: they are all of a transformer but its norms,
and a student calls some of them outside of their blocks. (Of a text encoder the embedding stays whole.) What is trained
stays whole in every process and is averaged by DDP, so checkpoints, moving averages and optimisers are the same with
and without.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel


def shard_frozen(trained: nn.Module, others: Iterable[nn.Module], device: str) -> int:
    """Shard the frozen Linear layers of a module that DDP is about to wrap and of others; how many there were."""
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    count = 0
    for module in (trained, *others):
        for part in module.modules():
            if isinstance(part, nn.Linear) and not any(p.requires_grad for p in part.parameters()):
                fully_shard(part, mesh=mesh, reshard_after_forward=True)  # roots, which each is, would stay gathered
                assert isinstance(part, FSDPModule)
                part.unshard()  # makes its buffers, which must not be a rollout's inference tensors
                part.reshard()
                count += 1
    frozen = [name for name, p in trained.named_parameters() if not p.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(trained, frozen)
    return count
