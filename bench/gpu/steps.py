"""The steps of gpu-check, most valuable first. Each runs in a process of its own, under a limit."""

from collections.abc import Callable
from dataclasses import dataclass

from bench.gpu import convolutions, cuda_library, kernel_tests, operations, probe, recorded, streams
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
    "greedy": Step(streams.greedy, 200, "greedy in bf16, FP8, FP8 attention: gate, first frame, 40 chunks, parts"),
    "convolutions": Step(convolutions.convolutions, 60, "the VAE's convolutions, form by form"),
    "build": Step(cuda_library.build, 60, "the kernels in CUDA C++, where nobody brought them"),
    "operations": Step(operations.times, 70, "every operation's time beside the library's"),
    "causal": Step(streams.causal, 100, "self-forcing (with the gate), longlive, diagonal: first frame, 10 chunks"),
    "eager": Step(streams.eager, 45, "plain PyTorch, 10 chunks"),
    "kernel-tests": Step(kernel_tests.kernel_tests, kernel_tests.LIMIT, "tests/kernels on the device"),
    "endurance": Step(streams.endurance, 60, "up to 200 chunks: time, memory, picture"),
}
