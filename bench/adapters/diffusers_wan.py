"""diffusers' WanPipeline as an adapter: the bidirectional model makes all frames at once, with guidance.

python -m bench.adapters.diffusers_wan      # speaks JSON lines on stdin and stdout
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from bench.adapters.protocol import Engine, serve
from engine.runtime.device import DTYPES


class WanVideo:
    """Makes whole videos: all frames appear at the end."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from diffusers import WanPipeline
        from diffusers.utils import logging
        from transformers.utils import logging as encoder_logging

        logging.disable_progress_bar()
        encoder_logging.disable_progress_bar()
        # torch_dtype has a newer name, which the oldest version that setup.py allows does not know.
        warnings.filterwarnings("ignore", category=FutureWarning)
        torch.set_num_threads(int(settings["threads"]))
        self.settings = settings
        self.device = torch.device(settings.get("device", "cpu"))
        self.pipeline = WanPipeline.from_pretrained(settings["model"], torch_dtype=DTYPES[settings["dtype"]])
        self.pipeline.to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)

    def generate(self, prompt: str, seed: int, frames: int) -> Iterator[int]:
        rows = int(self.pipeline.tokenizer.model_max_length)
        video = self.pipeline(
            prompt,
            height=self.settings["height"],
            width=self.settings["width"],
            num_frames=frames,
            num_inference_steps=int(self.settings.get("steps", 50)),
            guidance_scale=float(self.settings.get("guidance", 5.0)),
            max_sequence_length=min(rows, 512),
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).frames[0]
        yield len(video)


def build(settings: dict[str, Any]) -> tuple[Engine, dict[str, Any]]:
    import diffusers

    steps, guidance = settings.get("steps", 50), settings.get("guidance", 5.0)
    return WanVideo(settings), {
        "about": f"diffusers {diffusers.__version__} WanPipeline, {steps} steps, CFG {guidance:g}"
    }


if __name__ == "__main__":
    serve(build)
