"""Prompt to embedding against transformers' UMT5 and diffusers' WanPipeline."""

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import AutoTokenizer, UMT5EncoderModel

from engine.model.text import MAX_ROWS, Tokenizer, clean_prompt, load_text_encoder

PROMPT = "a red circle moving right on gray"


@pytest.fixture(scope="module")
def theirs(model_dir):
    return AutoTokenizer.from_pretrained(model_dir / "tokenizer"), UMT5EncoderModel.from_pretrained(
        model_dir / "text_encoder"
    )


@pytest.mark.parametrize("prompt", [PROMPT, "red", "a dinosaur", "a " * 13 + "red"])
def test_equals_transformers_zero_padded(pipeline, theirs, prompt):
    tokenizer, encoder = theirs
    ids = tokenizer([prompt], return_tensors="pt").input_ids
    with torch.no_grad():
        real = encoder(ids).last_hidden_state  # no padding at all: nothing to mask
    embedding = pipeline.encode_prompt(prompt)
    assert embedding.shape == (1, 16, 24)
    assert real.abs().max() > 0.1
    assert (embedding[:, : real.shape[1]] - real).abs().max() < 1e-5
    assert (embedding[:, real.shape[1] :] == 0).all()


def test_equals_the_stock_pipeline(pipeline, model_dir):
    stock = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(model_dir / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(model_dir / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(model_dir / "vae"),
        transformer=WanTransformer3DModel.from_pretrained(model_dir / "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    for prompt in (PROMPT, "  a  red\n&amp;circle&lt; "):
        expected, _ = stock.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=16)
        assert (pipeline.encode_prompt(prompt) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("prompt", "clean"),
    [(" a\n\tred  circle ", "a red circle"), ("a &amp;amp; b &lt;c&gt;", "a & b <c>"), ("plain", "plain")],
)
def test_prompts_are_cleaned(prompt, clean):
    assert clean_prompt(prompt) == clean


def test_long_prompts_are_cut_at_the_models_rows(pipeline):
    full = pipeline.encode_prompt("red " * 40)
    assert full.shape == (1, 16, 24)
    assert (full.abs().amax(-1) > 0).all()
    # 15 words and the end mark: what stands behind them has no effect.
    assert torch.equal(full, pipeline.encode_prompt("red " * 15 + "blue circle"))
    assert not torch.equal(full, pipeline.encode_prompt("red " * 14 + "blue circle"))


def test_rows_are_the_tokenizers_limit_or_wans(model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_dir / "tokenizer")
    for limit, rows in ((7, 7), (512, 512), (10**30, MAX_ROWS)):
        tokenizer.model_max_length = limit
        tokenizer.save_pretrained(tmp_path / str(limit))
        ids, mask = Tokenizer(tmp_path / str(limit))(PROMPT)
        assert ids.shape == mask.shape == (1, rows)
    assert MAX_ROWS == 512


def test_batches_do_not_mix(pipeline, theirs):
    tokenizer, _ = theirs
    prompts = ["red", PROMPT]
    encoded = tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt")
    both = pipeline.stages.encode_text(encoded.input_ids, encoded.attention_mask)
    for row, prompt in zip(both, prompts, strict=True):
        assert (row - pipeline.encode_prompt(prompt)[0]).abs().max() < 1e-5


def test_encoder_is_loaded_in_the_dtype_asked_for(model_dir):
    encoder = load_text_encoder(model_dir / "text_encoder", torch.bfloat16, torch.device("cpu"))
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.training
