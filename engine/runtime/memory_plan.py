"""A memory plan: what is needed on every device in every phase of a run, as a table, as JSON and as an error."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MEGA, GIGA = 1 << 20, 1 << 30
# Estimates: CUDA's context with cuBLAS, cuDNN and kernels (1.9 GB on an H100, torch 2.11); thread stacks and code
# that oneDNN and MKL make on a processor.
CUDA_SHARE, CPU_SHARE = 1900 * MEGA, 40 * MEGA

TRANSFORMERS, LOADING, PROMPT, CLIP, SWITCH, PREPARING, PASS, DECODING = (
    "loading transformers", "loading", "encoding a prompt", "encoding a clip", "encoding another prompt",
    "preparing another prompt", "running a transformer", "decoding",
)  # fmt: skip
PHASES = (TRANSFORMERS, LOADING, PROMPT, CLIP, SWITCH, PREPARING, PASS, DECODING)
STREAMING = (SWITCH, PREPARING, PASS, DECODING)


@dataclass(frozen=True)
class Need:
    """One line of the plan. bytes: allocated; mapped: pages of files; during: the phases that hold them.

    again: the pages of files are those of an earlier line, mapped a second time. optional: what takes less where memory
    is short, so it counts in the peak and not in what must be free.
    """

    what: str
    device: str
    bytes: int
    mapped: int = 0
    during: tuple[str, ...] = PHASES
    again: bool = False
    optional: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """Needs of every device, and what is free there. All numbers are bytes."""

    needs: tuple[Need, ...]
    free: dict[str, int]
    ways: tuple[str, ...] = ()  # options with which it would fit, where it does not

    def peak(self, device: str, mapped: bool = True) -> int:
        """The most that is needed at once; without `mapped` only what is allocated."""
        return self._sum(self.phase(device, mapped), device, mapped)

    def phase(self, device: str, mapped: bool = True) -> str:
        """The phase that needs most."""
        return max(PHASES, key=lambda phase: self._sum(phase, device, mapped))

    def needed(self, device: str) -> int:
        """The most that must be free: a file's pages count once, however often they are mapped."""
        return max(sum(n.bytes + (0 if n.again else n.mapped) for n in self._of(phase, device) if not n.optional)
                   for phase in PHASES)  # fmt: skip

    def fits(self) -> bool:
        return all(self.needed(device) <= free for device, free in self.free.items())

    def check(self) -> None:
        """MemoryError if it does not fit: got, expected, and the options with which it would."""
        for device, free in self.free.items():
            if (needed := self.needed(device)) > free:
                phase = self.phase(device)
                needs = (need for need in self._of(phase, device) if not need.optional)
                largest = sorted(needs, key=lambda n: -(n.bytes + n.mapped))[:4]
                parts = ", ".join(f"{n.what} {_giga(n.bytes + n.mapped)}" for n in largest)
                ways = f"fits with: {'; or '.join(self.ways)}" if self.ways else "nothing that was tried would fit"
                raise MemoryError(f"memory: got {_giga(free)} GB free on {device}, expected {_giga(needed)} for "
                                  f"{phase} ({parts}); {ways}")  # fmt: skip

    def table(self) -> str:
        """A short table, one column a device; lines of less than a hundredth of the peak are added up."""
        devices = list(self.free)
        peaks = [self.peak(device) for device in devices]
        unit, words = (GIGA, "GB") if max(peaks) >= GIGA else (1 << 20, "MB")
        rows: list[tuple[str, list[int]]] = []
        others = [0] * len(devices)
        for what in dict.fromkeys(need.what for need in self.needs):
            own = [max(self._line(phase, what, device) for phase in PHASES) for device in devices]
            if all(count < peak / 100 for count, peak in zip(own, peaks, strict=True)):
                others = [a + b for a, b in zip(others, own, strict=True)]
            else:
                rows.append((what, own))
        files = [self.peak(device) - self._sum(self.phase(device), device, False) for device in devices]
        rows += [("others", others)] if any(others) else []
        rows.append(("peak", peaks))
        rows += [("  of it pages of files", files)] if any(files) else []
        rows.append(("free", list(self.free.values())))
        width = max(len(name) for name, _ in rows)
        lines = [f"{f'memory plan ({words})':{width}}  " + " ".join(f"{device:>8}" for device in devices)]
        lines += [f"{name:{width}}  " + " ".join(f"{_short(count / unit) if count else '-':>8}" for count in counts)
                  for name, counts in rows]  # fmt: skip
        return "\n".join([*lines, "peak: " + ", ".join(f"{device} while {self.phase(device)}" for device in devices)])

    def report(self) -> dict[str, Any]:
        """The plan as JSON: bytes by device."""
        return {
            device: {
                "needs": [{"what": n.what, "bytes": n.bytes, "mapped": n.mapped, "during": list(n.during)}
                          for n in self.needs if n.device == device],
                "peak": self.peak(device), "peak_allocated": self.peak(device, mapped=False),
                "phase": self.phase(device), "needed": self.needed(device), "free": free,
            }
            for device, free in self.free.items()
        }  # fmt: skip

    def _line(self, phase: str, what: str, device: str) -> int:
        return sum(n.bytes + n.mapped for n in self._of(phase, device) if n.what == what)

    def _of(self, phase: str, device: str) -> Iterator[Need]:
        return (n for n in self.needs if n.device == device and phase in n.during)

    def _sum(self, phase: str, device: str, mapped: bool) -> int:
        return sum(n.bytes + (n.mapped if mapped else 0) for n in self._of(phase, device))


def _giga(count: int) -> str:
    """GB (2^30 bytes), with as many digits as matter."""
    return _short(count / GIGA)


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"
