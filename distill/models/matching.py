"""Distribution matching: which way a sample has to move so that its distribution becomes the teacher's.

Scores are velocities v = noise - x at a noised point x_t = (1 - sigma) x + sigma noise. The clean prediction there is
x_t - sigma v. `v_real` is the teacher's, `v_gen` that of a model of the student's own samples.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def direction(v_real: Tensor, v_gen: Tensor, mu: Tensor, noisy: Tensor, sigma: Tensor, *, normalise: bool) -> Tensor:
    """The part that Eq. 10 subtracts from mu: v_real - v_gen; all [B, C, F, h, w], sigma [B].

    `normalise` is DMD's: the difference of the two clean predictions over the mean error of the teacher's.
    """
    difference = v_real - v_gen
    if not normalise:
        return difference
    level = sigma.view(-1, 1, 1, 1, 1)
    return level * difference / teacher_error(mu, noisy - level * v_real)


def teacher_error(x: Tensor, x_real: Tensor) -> Tensor:
    """Mean distance of a sample to the teacher's clean prediction, [B, 1, 1, 1, 1]; not zero, without gradient."""
    return (x - x_real).detach().abs().mean((1, 2, 3, 4), keepdim=True).clamp(min=1e-3)


def moving_loss(mu: Tensor, away: Tensor) -> Tensor:
    """Eq. 10: half the mean square of mu - sg(mu - away). Its gradient by mu is `away` over the number of elements."""
    return 0.5 * (mu - (mu - away).detach()).square().mean()


def motion_loss(clip: Tensor, v_real: Tensor, v_gen: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """`moving_loss` of a clip's motion, the differences of neighbouring frames. Arguments as `direction`'s."""
    moves = [part.detach().diff(dim=2) for part in (v_real, v_gen, clip, noisy)]
    return moving_loss(clip.diff(dim=2), direction(*moves, sigma, normalise=True))


def sid_loss(x: Tensor, x_real: Tensor, x_gen: Tensor, alpha: float) -> Tensor:
    """Score identity distillation, as Self-Forcing's code has it: the gradient runs through both predictions.

    x is the sample, x_real and x_gen the clean predictions of teacher and critic for it, all [B, C, F, h, w].
    """
    gap = x_real - x_gen
    return (gap * ((x_real - x) - alpha * gap) / teacher_error(x, x_real)).mean()


def through(loss_of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """loss_of(x), whose gradient reaches x and nothing else that loss_of reads, such as the weights of a critic."""
    leaf = x.detach().requires_grad_()
    loss = loss_of(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach() + (gradient * (x - x.detach())).sum()
