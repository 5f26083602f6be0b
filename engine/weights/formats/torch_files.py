"""Files of torch.save, read with weights_only=True: code in them never runs, and no class of theirs is imported.

`signatures.kind_of` has checked the archive before: its entries are stored, and together no larger than the file.
"""

import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from engine.weights.formats.tensors import Stored, check_names, dense_problem

MOST_VALUES = 200_000  # in nested dictionaries; a training checkpoint with optimizers has some 20,000
MOST_DEPTH = 32  # of dictionaries in dictionaries
MOST_LINE = 1 << 16  # bytes of a name in a pickle
MOST_READS = 4 << 20  # of a file from before torch 1.6: some per value, a few per tensor

# Names that only tensors have. Another value under such a name stands for a tensor that is missing.
_OF_TENSORS = re.compile(
    r"(^|\.)(weight|bias|gamma|modulation|scale_shift_table|diff|diff_b|diff_m|lora_(A|B|up|down))$"
)


class Leaf(NamedTuple):
    """A value in nested dictionaries: its dotted name, and the dotted name of the innermost dictionary around it."""

    name: str
    folder: str
    value: Any


class TorchFile:
    """A checkpoint of torch.save.

    Dictionaries inside dictionaries become dotted names: {"generator": {"head.head.bias": t}} holds
    `generator.head.head.bias`. Everything else in the file, as step counts, is left out. `read` maps the file again,
    so that its pages leave memory with the tensors that were read. Files of torch before 1.6 cannot be mapped: they
    are read whole, once.
    """

    kind = "torch"

    def __init__(self, file: Path) -> None:
        self.file = file
        self.metadata: dict[str, str] = {}
        loaded, self.maps = load_torch(file)
        values = {leaf.name: leaf.value for leaf in leaves(loaded)}
        self._whole = {} if self.maps else values
        self.tensors = {name: stored(value) for name, value in values.items() if is_tensor(name, value)}

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        values = self._whole or {leaf.name: leaf.value for leaf in leaves(load_torch(self.file)[0])}
        return ((key, values[key].detach()) for key in keys)


def is_tensor(name: str, value: Any) -> bool:
    """Whether a value is a tensor, or stands where a tensor should be."""
    return isinstance(value, Tensor) or _OF_TENSORS.search(name) is not None


def stored(value: Any) -> Stored:
    """What is known of a value before its data is read."""
    if not isinstance(value, Tensor):
        return Stored((), type(value).__name__, dense_problem(value))
    problem = dense_problem(value)
    return Stored(() if problem else tuple(value.shape), value.dtype, problem)


def leaves(values: Mapping[Any, Any]) -> Iterator[Leaf]:
    """Every value in nested dictionaries, in order. ValueError for dictionaries without an end, as of one in itself."""
    opened = [("", iter(values.items()))]
    count = 0
    while opened:
        folder, entries = opened[-1]
        for key, value in entries:
            count += 1
            if count > MOST_VALUES or len(opened) > MOST_DEPTH:
                raise ValueError(f"more than {MOST_VALUES} values, or {MOST_DEPTH} dictionaries in each other")
            name = f"{folder}.{key}" if folder else str(key)
            if isinstance(value, Mapping):
                opened.append((name, iter(value.items())))
                break
            yield Leaf(name, folder, value)
        else:
            opened.pop()


class Unread:
    """Stands for an object of a class that is not imported: it takes what the file says and does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __new__(cls, *_: object, **__: object) -> "Unread":
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def load_torch(file: Path) -> tuple[Mapping[Any, Any], bool]:
    """The dictionary that torch.save wrote, and whether it is mapped; code in it never runs.

    Objects that are no tensors, such as the settings that Lightning stores, become `Unread`. ValueError for a file
    that is unreadable, or holds something else than a dictionary.
    """
    try:
        loaded, maps = _load(file)
    except MemoryError:
        raise
    except Exception as error:  # torch raises whatever a damaged file leads it to
        loaded, maps = _without_objects(file, error), True
    if isinstance(loaded, Mapping):
        _check(file, loaded)
        return loaded, maps
    what = f"{words}, pickled whole" if (words := getattr(loaded, "words", None)) else type(loaded).__name__
    raise ValueError(f"{file}: got {what}, expected a dictionary of tensors: a torch checkpoint that "
                     "torch.save(model.state_dict(), FILE) writes")  # fmt: skip


def _check(file: Path, loaded: Mapping[Any, Any]) -> None:
    """ValueError for more values than a checkpoint has, and for tensors of more bytes than the file."""
    try:
        found = [leaf for leaf in leaves(loaded) if is_tensor(leaf.name, leaf.value)]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: got {error}, expected a torch checkpoint of tensors") from None
    check_names(file, [leaf.name for leaf in found])
    plain = [leaf.value.untyped_storage() for leaf in found if dense_problem(leaf.value) is None]
    total = sum({storage.data_ptr(): storage.nbytes() for storage in plain}.values())
    if total > (size := file.stat().st_size):
        raise ValueError(f"{file}: got tensors of {total} bytes in a file of {size}, expected no more than it has")


class _Counted:
    """A file of which a pickle reads values one by one: it ends where they are more than any checkpoint has."""

    def __init__(self, opened: BinaryIO) -> None:
        self._opened, self._reads = opened, 0
        self.tell, self.seek, self.readinto = opened.tell, opened.seek, getattr(opened, "readinto")  # noqa: B009

    def read(self, size: int = -1) -> bytes:
        self._count()
        return self._opened.read(size)

    def readline(self) -> bytes:
        self._count()
        return self._opened.readline(MOST_LINE)

    def _count(self) -> None:
        self._reads += 1
        if self._reads > MOST_READS:
            raise ValueError(f"a pickle of more than {MOST_READS} values")


def _load(file: Path) -> tuple[Any, bool]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pickles' protocols, and of quantised and nested tensors
        # torch takes a path with this suffix for safetensors; the content says otherwise.
        if file.suffix != ".safetensors":
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True), True
            except RuntimeError as error:
                if "mmap" not in str(error):  # files of torch before 1.6 cannot be mapped
                    raise
        with file.open("rb") as opened:
            return torch.load(_Counted(opened), map_location="cpu", weights_only=True), False  # type: ignore[arg-type]


def _without_objects(file: Path, error: Exception) -> Any:
    """What the file holds beside objects of unknown classes. ValueError with the first error where that fails too."""
    reason = ValueError(f"{file}: got {_reason(error)}, expected a torch checkpoint of tensors")
    try:
        # It reads the names without importing them.
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        # torch fills only its own kinds of dictionaries.
        kinds: list[Any] = [(OrderedDict if re.search("[dD]ict$", name) else _unread(name), name) for name in names]
    except Exception:  # not a zip archive of torch, or a damaged one: the first error says more
        raise reason from None
    try:
        with torch.serialization.safe_globals(kinds):
            loaded, _ = _load(file)
    except MemoryError:
        raise
    except Exception:  # as above
        raise reason from None
    if isinstance(loaded, Mapping):
        _check(file, loaded)
        if not any(isinstance(leaf.value, Tensor) for leaf in leaves(loaded)):
            raise reason
    return loaded


def _unread(name: str) -> type[Unread]:
    """A class that stands for the one of that name."""
    return type(name, (Unread,), {"words": f"an object of class {name}"})


def _reason(error: Exception) -> str:
    """Why torch cannot read a file. Its own text advises to run the code in it."""
    text = str(error)
    if found := re.search(r"(?:[Uu]nsupported \w+:? )?(?:GLOBAL|[Uu]nsupported \w+:?) (?:`|')?([\w.]+)", text):
        if found[1].isdigit():
            return "a pickle that torch.save did not write"
        return f"an object of {found[1]}, which is no tensor"
    if "eights only" in text or "weights_only" in text:
        return "objects that are no tensors"
    return f"an unreadable file ({(text.splitlines() or [type(error).__name__])[0]})"
