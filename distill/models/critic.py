"""The critic of distribution matching: a copy of the teacher that learns what the student's own clips look like."""

import copy

from torch import Tensor, nn

from distill.models.sampling import joint_flow
from distill.models.student import add_lora, checkpointed, lora_of
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
