"""Frozen weights spread over the processes (FSDP2), for teachers that do not fit one device beside their students.

Only frozen Linear layers are sharded, and each is gathered while it is called. They hold nearly all weights of a
transformer, and a student calls some of them outside of their blocks. The embedding of a text encoder stays whole.
Trained parameters stay whole in every process, and DDP averages their gradients. Checkpoints, moving averages and
optimisers are therefore the same with and without sharding.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel


def shard_frozen(trained: nn.Module, others: Iterable[nn.Module], device: str) -> int:
    """Shard the frozen Linear layers of a module that DDP is about to wrap, and of others. Returns their number."""
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    count = 0
    for module in (trained, *others):
        for part in module.modules():
            if isinstance(part, nn.Linear) and not any(p.requires_grad for p in part.parameters()):
                # Each layer is a root of its own, and by default roots stay gathered.
                fully_shard(part, mesh=mesh, reshard_after_forward=True)
                assert isinstance(part, FSDPModule)
                part.unshard()  # makes its buffers now; a rollout would make them as inference tensors
                part.reshard()
                count += 1
    frozen = [name for name, p in trained.named_parameters() if not p.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(trained, frozen)
    return count
