"""Record cases of head dim 128 with flashdreams, which the public recordings lack: python peer_record.py FOLDER.

At that width Triton's attention and its bf16 path are those of Wan2.1-1.3B. The record is float32 on weights that are
bf16 numbers; a case of each dtype replays it.
"""

import json
import sys
from pathlib import Path

import torch
from peer_oracle import replay
from safetensors.torch import save_file

from bench.adapters import flashdreams_wheel as wheel
from bench.instruments import recordings
from bench.instruments.random_weights import RandomSource
from engine.model.transformer import WanTransformer
from engine.weights.names import diffusers_name

MODEL = {
    "patch_size": [1, 2, 2], "text_len": 64, "in_dim": 16, "dim": 128, "ffn_dim": 256, "freq_dim": 64, "text_dim": 24,
    "out_dim": 16, "num_heads": 1, "num_layers": 2, "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
CASE = {"chunk": 3, "local_attn_size": 6, "sink_size": 0, "steps": [1000, 750, 500, 250], "context_noise": 0}
FRAMES, HEIGHT, WIDTH = 12, 6, 8  # four chunks: the ring of two wraps
GAIN = 4.0  # of the queries' norm, so that attention matters


def main(folder: Path) -> None:
    wheel.open_wheel(torch.device("cpu"))
    folder.mkdir(parents=True, exist_ok=True)
    config = recordings.model_config(MODEL)
    with torch.device("meta"):
        model = WanTransformer(config)
    network = wheel.network_settings(config, MODEL["text_len"])
    wan = {diffusers_name(name): name for name in wheel.network_names(network)}
    source = RandomSource(model, "d128", 7, attention_gain=GAIN)
    weights = {wan[name]: value.bfloat16().contiguous() for name, value in source.read()}
    save_file(weights, folder / "model_d128.safetensors")
    random = torch.Generator().manual_seed(11)
    rows = (len(CASE["steps"]) - 1) * FRAMES
    given = {
        "noise": torch.randn(1, FRAMES, 16, HEIGHT, WIDTH, generator=random).bfloat16().float(),
        "renoise": torch.randn(rows, 16, HEIGHT, WIDTH, generator=random).bfloat16().float(),
        "text_embeds": torch.randn(1, 40, MODEL["text_dim"], generator=random).bfloat16().float(),
    }
    names = {dtype: f"d128_chunk3_local6_{dtype}" for dtype in ("float32", "bfloat16")}
    cases = {name: CASE | {"dtype": f"torch.{dtype}"} for dtype, name in names.items()}
    document = {"source": f"flashdreams {wheel.wheel_version()}, float32, by tests/bench/peer_record.py",
                "model_config": MODEL, "latent_hw": [HEIGHT, WIDTH], "timestep_shift": 5.0, "cases": cases}  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(document, indent=1) + "\n")

    def write(output: torch.Tensor) -> None:
        tensors = {f"{name}/{what}": value.clone() for name in cases for what, value in given.items()}
        tensors |= {f"{name}/output": output.clone() for name in cases}
        save_file(tensors, folder / "cases.safetensors")

    write(torch.zeros_like(given["noise"]))
    recording = recordings.read_recording(folder)
    case = next(case for case in recording.cases if case.dtype == torch.float32)
    write(replay(case, recording))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
