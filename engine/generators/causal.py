"""Self-Forcing, CausVid, LongLive, First-Frame Enhancement, Diagonal Distillation: one causal transformer."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from engine.config import Preset
from engine.generators.base import Generator, Geometry, Ring, State, timesteps
from engine.model.cache import RingCache
from engine.runtime.passes import Pass, PassKind, TextKV

DIT = PassKind("dit", "dit", timed=True)


@dataclass
class CausalState(State):
    cache: RingCache = field(kw_only=True)
    attn_sink: list[tuple[int, Tensor]] = field(default_factory=list)  # (position, latent frame) of the attention sink
    window: deque[tuple[int, Tensor]] = field(default_factory=deque)  # the same of the preset's other slots
    staged: bool = False  # the next commit can publish the last denoising call's keys and values


class CausalGenerator(Generator):
    """One transformer over a ring of latent frames, the current chunk included."""

    name = "causal"
    passes = (DIT,)

    @staticmethod
    def check(preset: Preset) -> None:
        least = preset.attn_sink + preset.chunk
        preset.expect("window", preset.window >= least, f"at least attn_sink + chunk ({least})")
        if (heads := preset.heads) is not None:
            least = heads.attn_sink + preset.chunk
            heads.expect("window", heads.window >= least, f"at least its attn_sink + chunk ({least})")
            heads.expect("attn_sink", heads.attn_sink <= preset.attn_sink, f"at most attn_sink ({preset.attn_sink})")
            # A window that is written again has the sink and the newest frames, and no others between them.
            most = preset.window - preset.attn_sink + preset.chunk + heads.attn_sink
            heads.expect("window", min(heads.window, preset.window) <= most,
                         f"at most window - attn_sink + chunk + its attn_sink ({most})")  # fmt: skip

    @staticmethod
    def rings(preset: Preset) -> Mapping[str, Ring]:
        return {"dit": Ring(preset.window, preset.attn_sink, preset.local_heads)}

    @staticmethod
    def steady(preset: Preset) -> int:
        return -(-preset.window // preset.chunk)

    def open(self, geometry: Geometry, text_kv: TextKV) -> CausalState:
        window = deque[tuple[int, Tensor]](maxlen=self.preset.window - self.preset.attn_sink)
        return CausalState(
            geometry, self._rope(geometry), text_kv, slots=self.preset.window, cache=self._cache("dit", geometry),
            window=window,
        )  # fmt: skip

    def _nothing(self, state: CausalState) -> dict[str, Any]:
        return {"attn_sink": [], "window": deque(maxlen=state.window.maxlen), "staged": False}

    def _rewritten(self, state: CausalState) -> dict[str, Any]:
        return {"stale": state.index > 0, "staged": False}

    def denoise(self, x: Tensor, t: float, state: CausalState, short: bool = False) -> Tensor:
        self._refresh(state)
        step = self._pass(x, t, state.position, state)
        # In a full ring the step writes over the oldest chunk, which the context pass reads.
        flow = self._run_denoising(step, state.cache, state, short, overwrites=state.cache.full(x.shape[2]))
        state.staged = True
        return flow

    def commit(self, x: Tensor, state: CausalState, supplied: bool = False) -> None:
        self._refresh(state)
        self._run_pending(state.cache, state)
        frames, cache = x.shape[2], state.cache
        changes: dict[str, Any] = {"pending": None, "joined": False, "kept": False, "staged": False}
        # After a prompt switch the last denoising call's keys belong to the old prompt, or are overwritten.
        lost = self.preset.commit == "noisy" and not state.staged
        if supplied or lost or self.preset.commit == "clean":
            # A supplied chunk is clean, so its timestep is 0, even if the preset's context_timestep is higher.
            t = 0.0 if supplied else self.preset.context_timestep
            changes["pending"] = self._run_context(self._pass(x, t, state.position, state), cache, state)
        if supplied or self.preset.commit != "none":
            new = [(state.position + offset, x[:, :, offset : offset + 1]) for offset in range(frames)]
            room = self.preset.attn_sink - len(state.attn_sink)
            changes["attn_sink"] = [*state.attn_sink, *new[:room]]
            changes["window"] = deque([*state.window, *new[room:]], state.window.maxlen)
            changes["held"] = state.held + frames
        state.publish(**changes, position=state.position + frames, index=state.index + 1)
        cache.rewind(state.held)

    def set_text(self, text_kv: TextKV, state: CausalState, recommit: bool = True, **also: Any) -> None:
        if recommit:
            state.publish(text_kv=text_kv, **self._rewritten(state), **also)
            return
        if not state.stale:
            self._run_pending(state.cache, state)  # it belongs to the old prompt
        # An earlier pending refresh stays pending.
        state.publish(text_kv=text_kv, pending=state.pending if state.stale else None, **also)

    def _pass(self, x: Tensor, t: float, position: int, state: CausalState) -> Pass:
        """A pass over the chunk x [B, C, F, h, w] that stands next in the ring."""
        cache, frames = state.cache, x.shape[2]
        rope = state.rope.at(position, frames)
        step = Pass(DIT, x, *rope, cache.next_slot, cache.valid(frames), timesteps(x, t))
        if (few := cache.local) is None:
            return step
        return replace(step, local_slot=few.next_slot, local_valid=few.valid(frames))

    def _refresh(self, state: CausalState) -> None:
        """After a switch of prompt or window, run one clean pass over the cached latents, at their own positions.

        `stale` is cleared only after success, so that a failure retries.
        """
        state.cache.limit(state.slots)
        state.cache.rewind(state.held)
        if not state.stale:
            return
        state.cache.reset()
        window = list(state.window)[self.preset.attn_sink - state.slots :]
        rest = len(window) % self.preset.chunk
        runs = [*_runs(state.attn_sink, self.preset.chunk), window[:rest], *_runs(window[rest:], self.preset.chunk)]
        for run in filter(None, runs):
            chunk = torch.cat([latent for _, latent in run], dim=2)
            step = self._pass(chunk, self.preset.context_timestep, run[0][0], state)
            self.stages.run(step, state.cache, state.text_kv)
            state.cache.commit(len(run))
        state.publish(held=state.cache.committed, pending=None, joined=False, stale=False)


def _runs(frames: list[tuple[int, Tensor]], size: int) -> Iterable[list[tuple[int, Tensor]]]:
    return (frames[start : start + size] for start in range(0, len(frames), size))
