"""Greedy Distill: the ETM reads each finished chunk once, then the SDD denoises the next one (Eq. 2-5, Alg. 1)."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

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
    sdd: RingCache = field(kw_only=True)  # [current | chunk 0 | last]
    c_f: Tensor | None = None  # temporal feature for the next chunk; None means zero (chunk 0)
    first: Tensor | None = None  # latent of chunk 0
    recent: deque[tuple[int, Tensor]] = field(default_factory=deque)  # (position, latent) of the ETM's chunks


class GreedyGenerator(Generator):
    """ETM and SDD.

    The SDD's keys are [current | chunk 0 | last]; the valid slots are a prefix from the first chunk on. Its context is
    clean, at timestep 0, computed once per chunk and kept for all steps. SDD positions stop at max_position. ETM
    positions grow without limit: only distances inside its window matter.
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
            geometry, self._rope(geometry), text_kv, etm=self._cache("etm", geometry), sdd=self._cache("sdd", geometry),
            recent=deque(maxlen=self.preset.window // self.preset.chunk),
        )  # fmt: skip

    def denoise(self, x: Tensor, t: float, state: GreedyState) -> Tensor:
        self._refresh(state)
        chunk = self.preset.chunk
        rope = state.rope.at(min(state.position, self.preset.max_position), chunk)
        valid = (1 + min(state.index, 2)) * chunk
        step = Pass(SDD, x, *rope, 0, valid, timesteps(x, t), state.c_f)
        return self.stages.run(step, state.sdd, state.text_kv)

    def commit(self, x: Tensor, state: GreedyState, supplied: bool = False) -> None:
        chunk = self.preset.chunk
        if x.shape[2] != chunk:
            raise ValueError(f"greedy: got a chunk of {x.shape[2]} latent frames, expected {chunk}")
        self._refresh(state)
        c_f = self._temporal(x, state.position, state)
        self._context(x, state.position, state)
        state.etm.commit(chunk)
        state.c_f = c_f
        state.first = x if state.index == 0 else state.first
        state.recent.append((state.position, x))
        state.position += chunk
        state.index += 1

    def set_text(self, text_kv: TextKV, state: GreedyState, recommit: bool = True) -> None:
        state.text_kv = text_kv
        if recommit and state.index > 0:  # without recommit, an earlier pending refresh stays pending
            state.stale = True

    def _temporal(self, x: Tensor, position: int, state: GreedyState) -> Tensor:
        """c_f = ETM(finished chunk) [B, tokens, dim]. It attends to the w chunks before it and to itself (Eq. 1, 2)."""
        chunk, etm = self.preset.chunk, state.etm
        step = Pass(ETM, x, *state.rope.at(position, chunk), etm.next_slot, etm.valid(chunk))
        return self.stages.run(step, etm, state.text_kv)

    def _context(self, x: Tensor, position: int, state: GreedyState) -> None:
        """Write a finished chunk's clean keys and values for the SDD. The chunk sees itself and chunk 0.

        The pass writes to the current chunk's slots; a copy moves the complete result to its own slots.
        """
        chunk, seen = self.preset.chunk, 1 if position == 0 else 2
        rope = state.rope.at(min(position, self.preset.max_position - chunk), chunk)
        self.stages.run(Pass(SDD_CONTEXT, x, *rope, 0, seen * chunk), state.sdd, state.text_kv)
        state.sdd.copy(0, seen * chunk, chunk)

    def _refresh(self, state: GreedyState) -> None:
        """After a prompt switch, recompute the ETM's window, chunk 0 and the last chunk under the new prompt.

        `stale` is cleared only after success, so that a failure retries.
        """
        if not state.stale or state.first is None:
            return
        state.etm.reset()
        for position, latent in state.recent:
            state.c_f = self._temporal(latent, position, state)
            state.etm.commit(self.preset.chunk)
        self._context(state.first, 0, state)
        position, last = state.recent[-1]
        if position:
            self._context(last, position, state)
        state.stale = False
