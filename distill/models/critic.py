"""The critic of distribution matching: a copy of the teacher that learns what the student's own clips look like."""

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from distill.models.sampling import joint_flow
from distill.models.student import add_lora, checkpointed, lora_of
from engine.model.layers import Hidden, total
from engine.model.transformer import WanTransformer


class Critic(nn.Module):
    """A bidirectional transformer. Its trained weights are float32: all, or with a rank those of a LoRA."""

    def __init__(self, teacher: WanTransformer, rank: int = 0, *, recompute: bool = False) -> None:
        super().__init__()
        model = copy.deepcopy(teacher)
        if rank:
            self.model = add_lora(model, lora_of(rank), recompute=recompute)
        else:
            model.float().requires_grad_(True)
            self.model = checkpointed(model) if recompute else model

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def flow(self, latent: Tensor, sigma: Tensor, text_emb: Tensor) -> Tensor:
        """The flow of whole clips: latent [B, C, F, h, w], sigma [B, F], text_emb [B, rows, dim] -> as the latent."""
        return joint_flow(self.model, latent, sigma, self.model.prepare_text(text_emb))

    def features(self, latent: Tensor, sigma: Tensor, text_emb: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Hidden states [B, tokens, dim] after some blocks, in their order, in a pass as of `flow`."""
        found = list[Tensor]()

        def keep(block: nn.Module, arguments: object, hidden: Hidden) -> Tensor:
            found.append(total(hidden))
            return found[-1]

        hooks = [self.model.blocks[number].register_forward_hook(keep) for number in blocks]
        try:
            self.flow(latent, sigma, text_emb)
        finally:
            for hook in hooks:
                hook.remove()
        return found
