"""Where a file keeps its LoRA: flat, or in the states of a training checkpoint, however deep they are nested."""

import re
from collections.abc import Iterable
from pathlib import Path

from engine.weights import sources
from engine.weights.checkpoint import shorten
from engine.weights.formats.torch_files import Leaf
from engine.weights.lora.keys import begins_module
from engine.weights.names import is_adapter, unwrapped

# States that hold an adapter, the preferred one first.
STATES = ("generator_lora", "lora", "lora_state_dict", *sources.STATES)
_NO_STUDENTS = r"critic|fake|real_score|teacher|discriminator|optimizer"


def take_state(file: Path, leaves: Iterable[Leaf]) -> tuple[list[tuple[str, Leaf]], list[str]]:
    """The values of the state with the LoRA, by their names in it; and notes. All values where none has LoRA names.

    ValueError where several states hold one and none of them is known.
    """
    every = list(leaves)
    placed = [(leaf, _state(leaf)) for leaf in every]
    states = dict.fromkeys(state for leaf, state in placed if state is not None and is_adapter([leaf.name]))
    if not states:
        return [(leaf.name, leaf) for leaf in every], []
    state = _preferred(file, list(states))
    folders = {leaf.folder for leaf, place in placed if place == state}
    start = f"{state}." if state else ""
    # A name that no spelling knows is refused later, if it stands among the others; so is a second transformer.
    mine = [(leaf.name.removeprefix(start), leaf) for leaf, place in placed if place == state
            or (not _known(place) and leaf.folder in folders and leaf.name.startswith(start))]  # fmt: skip
    taken = {leaf.name for _, leaf in mine}
    apart = [leaf for leaf in every if isinstance(leaf.value, int | float) and leaf.name not in taken
             and leaf.folder.split(".")[0] not in {*states}]  # fmt: skip
    others = [one or "the rest" for one in states if one != state]
    notes = [f"{file}: took {state or 'the plain tensors'} (also there: {', '.join(others)})"] if others else []
    notes += [f"{file}: {leaf.name} {leaf.value:g} is not used: the scale of a LoRA is its own alpha, else 1"
              for leaf in apart]  # fmt: skip
    return mine, notes


def _state(leaf: Leaf) -> str | None:
    """What stands before a module's name; None where no module begins in the name."""
    starts = [0, *(match.end() for match in re.finditer(r"\.", leaf.name))]
    inner = len(leaf.folder) + 1 if leaf.folder else 0
    for start in [inner, *starts]:
        if begins_module(unwrapped(leaf.name[start:])):
            return leaf.name[: max(start - 1, 0)]
    return None


def _known(state: str | None) -> bool:
    """Whether a name stands for a state, not for a part of a model."""
    return state is not None and bool({*state.split(".")} & {*STATES} or re.search(rf"ema|{_NO_STUDENTS}", state))


def _preferred(file: Path, states: list[str]) -> str:
    students = [state for state in states if not re.search(_NO_STUDENTS, state)]
    if len(students) == 1:
        return students[0]
    for name in STATES:
        if found := [state for state in students if name in (state.split(".") if state else [""])]:
            return found[0]
    raise ValueError(f"{file}: got LoRA in {shorten(states)}, expected it in one of {', '.join(filter(None, STATES))}")
