"""The text encoder against transformers' UMT5EncoderModel: the same bits, from the same files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel, UMT5Model
from transformers.utils import logging

from engine.weights.checkpoint import open_text_encoder

CPU = torch.device("cpu")
logging.disable_progress_bar()


def config(**changes):
    sizes = {"vocab_size": 50, "d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
    return UMT5Config(**sizes | {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 1} | changes)


def written(folder, settings, kind=UMT5EncoderModel):
    """A random encoder's folder. Its biases by position are large enough to decide where a row looks."""
    torch.manual_seed(0)
    model = kind(settings).eval()
    for name, p in model.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(p, std=2.0)
    model.save_pretrained(folder)
    return folder


def tokens(rows):
    """Two prompts of different lengths, padded."""
    ids = torch.randint(2, 50, (2, rows), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, rows // 3 :] = 0
    return ids * mask, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("rows", "changes"),
    [(16, {}), (300, {}), (64, {"relative_attention_num_buckets": 12, "relative_attention_max_distance": 40}),
     (16, {"layer_norm_epsilon": 1e-2, "num_heads": 1, "d_kv": 20})],
    ids=["short", "beyond the largest distance", "other buckets", "other sizes"],
)  # fmt: skip
def test_transformers_bits(tmp_path, dtype, rows, changes):
    folder = written(tmp_path, config(**changes))
    ours, theirs = open_text_encoder(folder, dtype, CPU), UMT5EncoderModel.from_pretrained(folder, dtype=dtype).eval()
    ids, mask = tokens(rows)
    with torch.no_grad():
        got, expected = ours(ids, mask), theirs(ids, attention_mask=mask).last_hidden_state
    assert got.dtype == expected.dtype == dtype
    assert expected.std() > 0.1
    assert torch.equal(got, expected)


def test_wo_stays_float32_beside_float16(tmp_path):
    encoder = open_text_encoder(written(tmp_path, config()), torch.float16, CPU)
    kept = {name for name, p in encoder.named_parameters() if p.dtype == torch.float32}
    assert kept == {f"block.{i}.layer.1.DenseReluDense.wo.weight" for i in range(3)}


@pytest.mark.parametrize("layout", ["shared alone", "embed_tokens alone", "both", "whole UMT5", "sharded"])
def test_every_stored_layout(tmp_path, layout):
    kind = UMT5Model if layout == "whole UMT5" else UMT5EncoderModel
    folder = written(tmp_path / "a", config(), kind)
    expected = UMT5EncoderModel.from_pretrained(folder).eval()
    if layout == "sharded":
        shutil.rmtree(folder)
        expected.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    elif layout != "whole UMT5":
        file = folder / "model.safetensors"
        stored = load_file(file)
        embedding = stored.pop("shared.weight")
        if layout != "embed_tokens alone":
            stored["shared.weight"] = embedding
        if layout != "shared alone":
            stored["encoder.embed_tokens.weight"] = embedding.clone()
        save_file(stored, file)
    ids, mask = tokens(16)
    with torch.no_grad():
        got = open_text_encoder(folder, torch.float32, CPU)(ids, mask)
        assert torch.equal(got, expected(ids, attention_mask=mask).last_hidden_state)


@pytest.mark.parametrize(("sharded", "variant"), [(False, False), (True, True), (False, True), (True, False)])
def test_a_variant_beside_it_is_not_taken(tmp_path, sharded, variant):
    """As people have it: model.fp16.safetensors in the same folder, with or without an index."""
    written(tmp_path, config())
    expected = open_text_encoder(tmp_path, torch.float32, CPU).state_dict()
    other = UMT5EncoderModel(config())
    small = {"max_shard_size": "20KB"}
    if sharded:
        (tmp_path / "model.safetensors").unlink()
        UMT5EncoderModel.from_pretrained(written(tmp_path / "a", config())).save_pretrained(tmp_path, **small)
    other.save_pretrained(tmp_path / "b", variant="fp16", **(small if variant else {}))
    for file in (tmp_path / "b").glob("*fp16*"):
        index = file.suffix == ".json"  # some programs name it so that it looks like an index without a variant
        shutil.copy(file, tmp_path / ("model.fp16.safetensors.index.json" if index else file.name))
    assert list(tmp_path.glob("*fp16*"))
    got = open_text_encoder(tmp_path, torch.float32, CPU).state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def without_a_tensor(folder):
    stored = load_file(folder / "model.safetensors")
    del stored["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"]
    save_file(stored, folder / "model.safetensors")


def with_settings(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_a_tensor, r"missing block\.1\.layer\.0\.SelfAttention\.relative_attention_bias\.weight"),
        (with_settings(num_layers=4), r"missing block\.3\."),
        (with_settings(num_layers=2), r"extra block\.2\."),
        (with_settings(d_ff=32), r"misshapen .*\[64, 48\] instead of \[32, 48\]"),
        (with_settings(model_type="t5"), r"got model_type 't5', expected 'umt5'"),
        (with_settings(feed_forward_proj="relu"), r"got feed_forward_proj 'relu', expected 'gated-gelu'"),
        (with_settings(relative_attention_num_buckets=6), r"got 6 buckets, expected a multiple of 4"),
        (with_settings(num_heads=0), r"expected positive sizes"),
        (lambda folder: (folder / "config.json").unlink(), r"got no file .*config\.json"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, change, said):
    """transformers fills what is missing with random numbers; a wrong prompt would go unnoticed."""
    change(written(tmp_path, config()))
    with pytest.raises((ValueError, FileNotFoundError), match=said) as raised:
        open_text_encoder(tmp_path, torch.float32, CPU)
    assert "\n" not in str(raised.value)
