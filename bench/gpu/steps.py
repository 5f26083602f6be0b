"""The steps of gpu-check, most valuable first. Each runs in a process of its own, under a limit."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.gpu import convolutions, kernel_tests, operations, probe, recorded, streams
from bench.gpu.lines import Lines


@dataclass(frozen=True)
class Step:
    run: Callable[[Lines], None]
    limit: float  # seconds
    about: str


STEPS = {
    "probe": Step(probe.probe, 40, "versions, one attention launch, the library's FP8 products"),
    "errors": Step(operations.errors, 70, "every operation against its reference"),
    "recorded": Step(recorded.recorded, 45, "recorded cases through graphs, fused and plain"),
    "greedy": Step(streams.greedy, 110, "greedy in bf16: gate, first frame, 40 chunks, parts"),
    "fp8": Step(streams.fp8, 90, "the same in FP8, and with FP8 attention"),
    "convolutions": Step(convolutions.convolutions, 60, "the VAE's convolutions, form by form"),
    "operations": Step(operations.times, 70, "every operation's time beside the library's"),
    "baselines": Step(streams.baselines, 60, "plain PyTorch, and self-forcing"),
    "kernel-tests": Step(kernel_tests.kernel_tests, 90, "tests/kernels on the device"),
    "endurance": Step(streams.endurance, 40, "200 chunks: time, memory, picture"),
}
