"""Greedy Distill: the ETM reads each finished chunk once, then the SDD denoises the next one (Eq. 2-5, Alg. 1)."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from engine.config import Preset
from engine.generators.base import Generator, Geometry, Ring, State, timesteps
from engine.model.cache import RingCache
from engine.runtime.passes import Pass, PassKind, TextKV

ETM = PassKind("etm", "etm", hidden=True)
SDD_CONTEXT = PassKind("sdd_context", "sdd", hidden=True)
SDD = PassKind("sdd", "sdd", timed=True, conditioned=True)


@dataclass
class GreedyState(State):
    etm: RingCache = field(kw_only=True)  # w past chunks and the newest one
    sdd: RingCache = field(kw_only=True)  # [chunk 0 | last | current], current right after those that exist
    c_f: Tensor | None = None  # temporal feature for the next chunk; None means zero (chunk 0)
    first: Tensor | None = None  # latent of chunk 0
    recent: deque[tuple[int, Tensor]] = field(default_factory=deque)  # (position, latent) of the preset's window


class GreedyGenerator(Generator):
    """ETM and SDD.

    The SDD's keys are [chunk 0 | last | current]; the current chunk comes right after those that exist, so the valid
    slots are always a prefix. Its context is clean, at timestep 0, computed once per chunk and kept for all steps. SDD
    positions stop at max_position. ETM positions grow without limit: only distances inside its window matter.
    """

    name = "greedy"
    passes = (ETM, SDD_CONTEXT, SDD)

    @staticmethod
    def check(preset: Preset) -> None:
        chunk = preset.chunk
        preset.expect("window", preset.window >= chunk and preset.window % chunk == 0, f"a multiple of chunk ({chunk})")
        preset.expect("max_position", preset.max_position >= 2 * chunk, "at least two chunks")
        preset.expect("commit", preset.commit == "clean", "clean for the greedy family")
        preset.expect("first_chunk", preset.first_chunk in (0, chunk), "0 for the greedy family")
        preset.expect("heads", preset.heads is None, "none for the greedy family")

    @staticmethod
    def rings(preset: Preset) -> Mapping[str, Ring]:
        return {"etm": Ring(preset.window), "sdd": Ring(3 * preset.chunk)}

    @staticmethod
    def steady(preset: Preset) -> int:
        return preset.window // preset.chunk

    @staticmethod
    def unit(preset: Preset) -> int:
        return preset.chunk

    def open(self, geometry: Geometry, text_kv: TextKV) -> GreedyState:
        return GreedyState(
            geometry, self._rope(geometry), text_kv, slots=self.preset.window,
            etm=self._cache("etm", geometry), sdd=self._cache("sdd", geometry),
            recent=deque(maxlen=self.preset.window // self.preset.chunk),
        )  # fmt: skip

    def _nothing(self, state: GreedyState) -> dict[str, Any]:
        return {"c_f": None, "first": None, "recent": deque(maxlen=state.recent.maxlen)}

    def _rewritten(self, state: GreedyState) -> dict[str, Any]:
        return {"stale": state.stale or state.index > 0}

    def denoise(self, x: Tensor, t: float, state: GreedyState, short: bool = False) -> Tensor:
        self._refresh(state)
        chunk = self.preset.chunk
        rope = state.rope.at(min(state.position, self.preset.max_position), chunk)
        slot = min(state.index, 2) * chunk
        step = Pass(SDD, x, *rope, slot, slot + chunk, timesteps(x, t), state.c_f)
        return self._run_denoising(step, state.sdd, state, short)

    def commit(self, x: Tensor, state: GreedyState, supplied: bool = False) -> None:
        chunk = self.preset.chunk
        if x.shape[2] != chunk:
            raise ValueError(f"greedy: got a chunk of {x.shape[2]} latent frames, expected {chunk}")
        self._refresh(state)
        self._run_pending(state.sdd, state)
        c_f = self._temporal(x, state.position, state)
        pending = self._run_context(self._context(x, state.position, state), state.sdd, state)
        state.publish(
            c_f=c_f, first=x if state.index == 0 else state.first, pending=pending, joined=False, kept=False,
            recent=deque([*state.recent, (state.position, x)], state.recent.maxlen),
            held=state.held + chunk, position=state.position + chunk, index=state.index + 1,
        )  # fmt: skip
        state.etm.rewind(state.held)

    def set_text(self, text_kv: TextKV, state: GreedyState, recommit: bool = True, **also: Any) -> None:
        if recommit:
            state.publish(text_kv=text_kv, **self._rewritten(state), **also)
            return
        if not state.stale:
            self._run_pending(state.sdd, state)  # it belongs to the old prompt
        # An earlier pending refresh stays pending.
        state.publish(text_kv=text_kv, pending=state.pending if state.stale else None, **also)

    def _temporal(self, x: Tensor, position: int, state: GreedyState) -> Tensor:
        """c_f = ETM(finished chunk) [B, tokens, dim]. It attends to the w chunks before it and to itself (Eq. 1, 2)."""
        chunk, etm = self.preset.chunk, state.etm
        step = Pass(ETM, x, *state.rope.at(position, chunk), etm.next_slot, etm.valid(chunk))
        return self.stages.run(step, etm, state.text_kv)

    def _context(self, x: Tensor, position: int, state: GreedyState) -> Pass:
        """The pass that writes a finished chunk's clean keys and values for the SDD. It sees itself and chunk 0."""
        chunk, slot = self.preset.chunk, self.preset.chunk if position else 0
        rope = state.rope.at(min(position, self.preset.max_position - chunk), chunk)
        return Pass(SDD_CONTEXT, x, *rope, slot, slot + chunk)

    def _refresh(self, state: GreedyState) -> None:
        """After a switch of prompt or window, recompute the ETM's window, chunk 0 and the last chunk.

        `stale` is cleared only after success, so that a failure retries.
        """
        state.etm.limit(state.slots)
        state.etm.rewind(state.held)
        if not state.stale or state.first is None:
            return
        state.etm.reset()
        c_f = None
        for position, latent in list(state.recent)[-(state.slots // self.preset.chunk) :]:
            c_f = self._temporal(latent, position, state)
            state.etm.commit(self.preset.chunk)
        finished = dict([(0, state.first), state.recent[-1]])  # one chunk only, if the last one is chunk 0
        for position, latent in finished.items():
            self.stages.run(self._context(latent, position, state), state.sdd, state.text_kv)
        state.publish(c_f=c_f, held=state.etm.committed, pending=None, joined=False, stale=False)
