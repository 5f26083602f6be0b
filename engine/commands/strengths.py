"""--adapter-at TIME NAME=STRENGTH: the changes of adapters' strengths that a run makes while it streams."""

from collections.abc import Callable, Iterable

from engine.options import real_number
from engine.weights.adapters import Adapter


def strengths_at(
    entries: Iterable[tuple[str, str]], adapters: Iterable[str], frame_of: Callable[[str], int], limit: int | None
) -> list[tuple[int, dict[str, float]]]:
    """Frame and new strengths of each change, by frame; of two at one frame the last one given comes last.

    ValueError for a time at or after the end, a name that no adapter has, or a strength that is no finite number.
    """
    names, made = [Adapter.of(text).name for text in adapters], []
    for when, text in entries:
        name, _, number = text.rpartition("=")
        if name not in names:
            expected = f"NAME=STRENGTH, the name one of {', '.join(names)}" if names else "--adapter as well"
            raise ValueError(f"--adapter-at: got {text!r}, expected {expected}")
        try:
            strength = real_number(number)
        except ValueError:
            raise ValueError(f"--adapter-at: got {text!r}, expected NAME=STRENGTH, as in {name}=0.5") from None
        frame = frame_of(when)
        if limit is not None and frame >= limit:
            raise ValueError(f"--adapter-at {when}: got frame {frame}, expected one before the end at {limit}")
        made.append((frame, {name: strength}))
    return sorted(made, key=lambda change: change[0])
