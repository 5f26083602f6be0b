"""Prompt to embedding against transformers' UMT5 and diffusers' WanPipeline."""

import json
import random
import shutil
import string
import warnings

import ftfy
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils import is_ftfy_available
from texts.garbled import TEXTS, garbled
from transformers import AutoTokenizer, UMT5EncoderModel

from engine.loader import EMBEDDED
from engine.model.text import MAX_ROWS, PromptWarning, Tokenizer, check_prompt, clean_prompt, is_blank
from engine.weights.checkpoint import open_text_encoder

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
    for prompt in (PROMPT, "  a  red\n&amp;circle&lt; ", "ａ ｒｅｄ ﻿circle “on” gray", "a re&zwnj;d"):
        expected, _ = stock.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=16)
        assert (pipeline.encode_prompt(prompt) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("prompt", "clean"),
    [(" a\n\tred  circle ", "a red circle"), ("a &amp;amp; b &lt;c&gt;", "a & b <c>"), ("plain", "plain")],
)
def test_prompts_are_cleaned(prompt, clean):
    assert clean_prompt(prompt) == clean == prompt_clean(prompt)


def test_prompts_are_cleaned_as_by_diffusers():
    assert is_ftfy_available()  # without it diffusers cleans otherwise
    choose = random.Random(1)
    prompts = [*TEXTS, *(garbled(choose) for _ in range(10_000)), "\ud83d\ude00 red", "re\udce9d", "a\0b"]
    for prompt in prompts:
        assert clean_prompt(prompt) == prompt_clean(prompt), ascii(prompt)
    assert sum(clean_prompt(prompt) != prompt for prompt in prompts) > 3000


def test_plain_prompts_need_no_ftfy():
    """Cleaning leaves ftfy out for printable ASCII without &: ftfy returns that as it is."""
    choose = random.Random(2)
    plain = [char for char in map(chr, range(32, 127)) if char != "&"]
    assert sorted(plain) == sorted(set(string.printable) - set("&\t\n\r\x0b\x0c"))
    prompts = ["".join(plain), *("".join(choose.choices(plain, k=choose.randint(0, 60))) for _ in range(20_000))]
    pairs = [a + b + c for a in "<;#[\\" for b in plain for c in plain]
    for prompt in prompts + pairs:
        assert ftfy.fix_text(prompt) == prompt
        assert clean_prompt(prompt) == prompt_clean(prompt)


BLANK = ["", " ", "\n\t", "\u200b", "\ufeff", "\x01\x02", "\u200b \u200d\u2060", "\x1b[0m", "&nbsp;", "&#8203;",
         "\u3000", "\u3164", "\ufe0f", "\u00ad", "\u2800"]  # fmt: skip
REFUSED = [*BLANK, "re\udce9d", "\ud83d", "a\0b", "&#" + "1" * 5000 + ";", "&amp;" * 5000]


@pytest.mark.parametrize("prompt", REFUSED, ids=lambda prompt: ascii(prompt[:12]))
def test_prompts_that_no_model_can_read_are_refused(pipeline, prompt):
    for call in (lambda: check_prompt(prompt), lambda: pipeline.stream(prompt), lambda: stream.set_prompt(prompt)):
        with (
            pipeline.stream(PROMPT) as stream,
            pytest.raises(ValueError, match=r"^prompt: got .*, expected ") as raised,
        ):
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("prompt", ["a", "红", "😀", "🫨", "\u0301", "?", "&#233;", "\ue000", "é\u200b"])
def test_what_shows_something_is_a_prompt(prompt):
    assert not is_blank(clean_prompt(prompt))
    check_prompt(prompt)


def test_long_prompts_are_cut_at_the_models_rows(pipeline):
    full = pipeline.encode_prompt("red " * 40)
    assert full.shape == (1, 16, 24)
    assert (full.abs().amax(-1) > 0).all()
    # 15 words and the end mark: what stands behind them has no effect.
    assert torch.equal(full, pipeline.encode_prompt("red " * 15 + "blue circle"))
    assert not torch.equal(full, pipeline.encode_prompt("red " * 14 + "blue circle"))


@pytest.mark.parametrize(
    ("prompt", "count", "rest"),
    [
        ("red " * 40, 41, "red red red red red red red red red red ..."),
        ("red " * 15 + "blue circle", 18, "blue circle"),
        ("“red” " * 15 + "blue", 47, None),
        ("red&nbsp;" * 15 + "\n\nblue", 17, "blue"),
    ],
)
def test_cut_prompts_say_so(pipeline, model_dir, prompt, count, rest):
    tokens = AutoTokenizer.from_pretrained(model_dir / "tokenizer")([prompt_clean(prompt)]).input_ids[0]
    assert len(tokens) == count
    with pytest.warns(PromptWarning) as warned:
        pipeline.encode_prompt(prompt)
    (said,) = [str(one.message) for one in warned]
    assert said.startswith(f"the prompt has {count} tokens, the model reads 16: the rest, from ")
    assert said.endswith("is ignored")
    assert rest is None or f'from "{rest}",' in said
    with pipeline.stream(PROMPT) as stream, pytest.warns(PromptWarning):
        stream.set_prompt(prompt)


def test_prompts_that_fit_warn_of_nothing(pipeline):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompt in ("red " * 15, "red", "“" + "red " * 13):
            pipeline.encode_prompt(prompt)


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
    encoder = open_text_encoder(model_dir / "text_encoder", torch.bfloat16, torch.device("cpu"))
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.training


def same_as_transformers(folder, prompts):
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    for prompt in prompts:
        expected = theirs([clean_prompt(prompt)], padding="max_length", max_length=ours.rows, truncation=True,
                          return_tensors="pt")  # fmt: skip
        ids, mask = ours(prompt)
        assert torch.equal(ids, expected.input_ids), prompt
        assert torch.equal(mask, expected.attention_mask), prompt


PROMPTS = [
    PROMPT,
    "",
    " ",
    "red",
    "a </s> b",
    "<pad> red",
    "a dinosaur",
    "red " * 40,
    "A  Red\tCIRCLE",
    "caf\u00e9 \u4e2d",
]


def test_tokens_are_transformers_tokens(model_dir):
    same_as_transformers(model_dir / "tokenizer", PROMPTS)
    same_as_transformers(EMBEDDED / "tokenizer", PROMPTS)


@pytest.mark.parametrize("settings", ["whole", "pad token as an object", "none"])
def test_tokenizer_settings(model_dir, tmp_path, settings):
    folder = shutil.copytree(model_dir / "tokenizer", tmp_path / "tokenizer")
    file = folder / "tokenizer_config.json"
    if settings == "none":
        file.unlink()
        tokenizer = Tokenizer(folder)
        assert tokenizer.rows == MAX_ROWS
        ids, mask = tokenizer("red")
        assert ids[0, 2:].sum() == 0  # <pad> is token 0
        assert mask.sum() == 2
    elif settings == "pad token as an object":
        stored = json.loads(file.read_text())
        file.write_text(json.dumps(stored | {"pad_token": {"content": "<pad>", "__type": "AddedToken"}}))
    if settings != "none":
        same_as_transformers(folder, PROMPTS)


def test_a_folder_with_sentencepiece_alone_is_converted(tmp_path):
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    with (tmp_path / "spiece.model").open("wb") as written:
        trainer.train(
            sentence_iterator=iter(["a red circle moving right", "a blue square moving down"] * 50), vocab_size=24,
            model_writer=written, model_type="unigram", bos_id=-1, pad_id=0, eos_id=1, unk_id=2, minloglevel=2,
        )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "model_max_length": 24}')
    same_as_transformers(tmp_path, ["a red square", "a green circle", "circle " * 30])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "{", "tokenizer.json: got .*expected a tokenizer"),
        ("tokenizer.json", '{"model": {}}', "tokenizer.json: got .*expected a tokenizer"),
        ("tokenizer_config.json", '{"pad_token": "<none>"}', "got no token <none>, expected the pad token"),
        ("tokenizer_config.json", "[]", "expected a JSON object"),
    ],
)
def test_damaged_tokenizers_are_refused(model_dir, tmp_path, name, content, said):
    folder = shutil.copytree(model_dir / "tokenizer", tmp_path / "tokenizer")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=said) as raised:
        Tokenizer(folder)
    assert "\n" not in str(raised.value)


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(model_dir, tmp_path):
    folder = shutil.copytree(model_dir / "tokenizer", tmp_path / "tokenizer")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"got neither tokenizer\.json nor spiece\.model") as raised:
        Tokenizer(folder)
    assert "\n" not in str(raised.value)
    (folder / "spiece.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"got .*, expected a tokenizer") as raised:
        Tokenizer(folder)
    assert "\n" not in str(raised.value)
