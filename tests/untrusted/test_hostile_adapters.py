"""Adapters and tokenizers whose settings name code, hang a matcher, or ask for what no layer has."""

import json
import re
import shutil
from random import Random

import pytest
import torch
from fuzzing import checked
from safetensors.torch import save_file

from engine.config import TransformerConfig
from engine.model.text import Tokenizer
from engine.weights.adapters import describe
from engine.weights.lora.form import read_lora
from engine.weights.lora.patterns import Pattern

CONFIG = TransformerConfig(num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=8, text_dim=24,
                           freq_dim=32, ffn_dim=48, num_layers=2, cross_attn_norm=True)  # fmt: skip
MODULE = "base_model.model.blocks.0.attn1.to_q"
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["blocks.0.attn1.to_q"]}


def folder_of(path, rank=4, text=None, **config):
    pair = {f"{MODULE}.lora_A.weight": torch.ones(rank, 32), f"{MODULE}.lora_B.weight": torch.ones(32, rank)}
    save_file(pair, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(text or json.dumps(PLAIN | config))
    return path


def problem_of(folder):
    """What is wrong with an adapter, found in under 2 s and 200 MB; None if nothing is."""
    found = []

    def read(folder):
        try:
            found.append(describe(folder, CONFIG).problem)
        except ValueError as error:
            found.append(str(error))

    checked(read, folder)
    return found[0]


SLOW = ["(a+)+$", "(.*)*x", r"(\w+\.?)*!", "(b|bl|l|lo|o|oc|c|ck|k|ks|s)*!", ".*.*.*.*.*.*.*.*.*.*.*.*!", "(a?){500}x"]
REFUSED = ["(?=x)a", "(?!x)a", "(?<=x)a", r"(a)\1", "((((a*)*)*)*)*", "(", "a" * 501, r"\Bq"]


@pytest.mark.parametrize("pattern", [*SLOW, *REFUSED])
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_patterns_end(tmp_path, key, pattern):
    value = {pattern: 4} if key.endswith("pattern") else pattern
    said = problem_of(folder_of(tmp_path, **{key: value}))
    if pattern in REFUSED:
        assert f"got {key}" in said
        assert "expected a regular expression without look-around" in said
    elif key == "target_modules":
        assert "expected those of target_modules alone" in said
    else:
        assert said is None


def pattern(choose, depth=0):
    """A random pattern of the kind that configurations hold."""
    kind = choose.random()
    if depth > 3 or kind < 0.35:
        return choose.choice(["a", "b", ".", r"\.", r"\d", "[ab]", "[^a]", "to_q", "0", r"\w", "[0-9a]", r"\S", r"\b"])
    if kind < 0.55:
        return pattern(choose, depth + 1) + pattern(choose, depth + 1)
    if kind < 0.75:
        return f"({choose.choice(['', '?:'])}{pattern(choose, depth + 1)}|{pattern(choose, depth + 1)})"
    return f"(?:{pattern(choose, depth + 1)}){choose.choice(['*', '+', '?', '{2}', '{1,3}', '*?', '{0,}'])}"


def test_patterns_match_as_pythons():
    choose, matched = Random(1), 0
    for _ in range(1500):
        text = choose.choice(["", "", "^"]) + pattern(choose) + choose.choice(["", "", "$"])
        name = "".join(choose.choice(["a", "b", ".", "0", "to_q", ".a"]) for _ in range(choose.randrange(7)))
        try:
            ours = Pattern(text)
        except ValueError:
            continue
        assert ours.matches(name) == (re.fullmatch(text, name) is not None), (text, name)
        assert ours.matches_end(name) == (re.match(rf"(.*\.)?({text})$", name) is not None), (text, name)
        matched += ours.matches(name)
    assert matched > 100


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"megatron_core": "evil"}, "got megatron_core 'evil'"), ({"megatron_config": {"a": 1}}, "got megatron_config"),
        ({"lora_bias": False, "a_new_key": [1]}, "got a_new_key"), ({"a\nb": 1}, r"got 'a\\nb'"),
        ({"r": 0}, "got r 0, expected a positive whole number"), ({"r": 1.5}, "got r 1.5"), ({"r": True}, "got r True"),
        ({"r": 10**400}, "got r 1000"), ({"r": 2**21}, "got r 2097152, expected .* up to 1048576"),
        ({"lora_alpha": float("nan")}, "got NaN, expected a finite"),
        ({"lora_alpha": float("inf")}, "got Infinity, expected a finite"),
        ({"lora_alpha": 10**400}, "got lora_alpha 1000"), ({"lora_alpha": -1}, "got lora_alpha -1"),
        ({"rank_pattern": {"to_q": 0}}, "got rank_pattern"),
        ({"alpha_pattern": {"to_q": float("nan")}}, "got NaN, expected a finite"),
        ({"rank_pattern": {str(n): 4 for n in range(5000)}}, "expected up to 4096 positive numbers"),
        ({"rank_pattern": [1]}, "got rank_pattern"), ({"target_modules": [1]}, "got target_modules"),
        ({"target_modules": {"a": 1}}, "got target_modules"), ({"target_modules": ["a"] * 5000}, "up to 4096 names"),
        ({"peft_type": ["LORA"]}, "got peft_type"), ({"bias": {}}, "got bias"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)).replace("\n", " "),
)  # fmt: skip
def test_settings_of_adapters(tmp_path, entry, said):
    assert re.search(said, problem_of(folder_of(tmp_path, **entry)))


def test_what_peft_writes_by_itself_is_no_fault(tmp_path):
    unset = {"megatron_core": "megatron.core", "megatron_config": None, "a_later_method": None, "loftq_config": {},
             "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}, "task_type": None,
             "base_model_name_or_path": "../../etc/passwd", "revision": "main",
             "runtime_config": {"ephemeral_gpu_offload": False}}  # fmt: skip
    assert problem_of(folder_of(tmp_path, **unset)) is None


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("chosen", [r"^(?!.*attn2).*\.to_q$", r"(?<=x)a", "(", "all-linear", ["to_q"], 3])
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_a_choice_of_modules_in_a_file_is_not_read(tmp_path, prefix, chosen, key):
    """The file itself has the modules. Folders of PEFT are compared with the choice, and need one that can be read."""
    metadata = json.dumps({prefix + name: value for name, value in (PLAIN | {key: chosen}).items()})
    pair = {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 32),
            "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.ones(32, 4)}  # fmt: skip
    save_file(pair, tmp_path / "lora.safetensors", {"lora_adapter_metadata": metadata})
    assert problem_of(tmp_path / "lora.safetensors") is None
    assert [change.scale for change in read_lora(tmp_path / "lora.safetensors").changes.values()] == [2.0]


def test_ranks_and_names_beyond_the_layer(tmp_path):
    assert "got rank 33 of blocks.0.attn1.to_q.weight, expected at most 32" in problem_of(folder_of(tmp_path, 33, r=33))
    assert problem_of(folder_of(tmp_path, 32, r=32)) is None
    twice = json.dumps(PLAIN)[:-1] + ', "r": 8}'
    assert "got key 'r' twice" in problem_of(folder_of(tmp_path, text=twice))


def test_a_text_encoders_adapter_is_named(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "text_encoder").mkdir()
    folder_of(tmp_path / "text_encoder")
    assert [note for note in describe(tmp_path, CONFIG).notes if "text_encoder is there and not used" in note]


ALPHAS = {"nan": torch.nan, "large": 10**400, "larger": 10**5000, "bool": True, "text": "8", "none": None, "list": [8],
          "two": torch.ones(2), "inf": torch.inf}  # fmt: skip


@pytest.mark.parametrize("kind", ALPHAS)
def test_alphas_in_files(tmp_path, kind):
    name = MODULE.removeprefix("base_model.model.")
    torch.save({f"{name}.lora_A.weight": torch.ones(4, 32), f"{name}.lora_B.weight": torch.ones(32, 4),
                f"{name}.alpha": ALPHAS[kind]}, tmp_path / "lora.pt")  # fmt: skip
    assert "expected" in problem_of(tmp_path / "lora.pt")


@pytest.mark.parametrize("number", ["²", "9" * 400, "-1", "٣"])
def test_odd_numbers_of_blocks(tmp_path, number):
    pair = {f"blocks.{number}.attn1.to_q.lora_{x}.weight": torch.ones(4, 32) for x in "AB"}
    pair[f"blocks.{number}.attn1.to_q.lora_B.weight"] = torch.ones(32, 4)
    save_file(pair, tmp_path / "lora.safetensors")
    assert "expected" in problem_of(tmp_path / "lora.safetensors")


@pytest.fixture
def tokenizer(model_dir, tmp_path):
    """A folder and a function that changes its tokenizer.json."""
    folder = shutil.copytree(model_dir / "tokenizer", tmp_path / "tokenizer")
    file = folder / "tokenizer.json"

    def change(**entries):
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))
        return folder

    return change


@pytest.mark.parametrize(("regex", "fits"), [
    (" {2,}", True), (r"\s+", True), ("[ab]*", True),
    (r"[\r\n\t]", True), (r"[^\s.\-]+", True), (r"[\s]+[\s]+", False),
    ("(a+)+$", False), ("a*a*b", False), (r"(a)\1", False),
    ("((x{1,1000}){1,1000}){1,1000}", False), ("a|aa", False), (".*", False),
])  # fmt: skip
@pytest.mark.parametrize("place", ["normalizer", "nested", "pre_tokenizer"])
def test_patterns_of_tokenizers(tokenizer, regex, fits, place):
    replace = {"type": "Replace", "pattern": {"Regex": regex}, "content": " "}
    nested = {
        "type": "Sequence",
        "normalizers": [{"type": "Lowercase"}, {"type": "Sequence", "normalizers": [replace]}],
    }
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    folder = tokenizer(**{"normalizer": {"normalizer": replace}, "nested": {"normalizer": nested},
                          "pre_tokenizer": {"pre_tokenizer": split}}[place])  # fmt: skip
    if fits:
        Tokenizer(folder)
    else:
        with pytest.raises(ValueError, match="expected one letter or class, repeated once"):
            Tokenizer(folder)


def test_tables_of_tokenizers_that_point_outside(tokenizer):
    with pytest.raises(ValueError, match="expected a tokenizer that reads every prompt"):
        Tokenizer(tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}))
    words = [{"Sequence": {"id": "A", "type_id": 0}}] + [{"SpecialToken": {"id": "</s>", "type_id": 0}}] * 1000
    ends = {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}
    post = {"type": "TemplateProcessing", "single": words, "pair": [], "special_tokens": ends}
    with pytest.raises(ValueError, match="got 1000 tokens around a prompt, expected fewer than 16"):
        Tokenizer(tokenizer(normalizer=None, post_processor=post))


@pytest.mark.parametrize("settings", [
    {"model_max_length": "x"}, {"model_max_length": -1}, {"model_max_length": [1]}, {"model_max_length": 0.5},
    {"pad_token": 5}, {"pad_token": {"a": 1}}, {"pad_token": "x" * 10_000}, {"pad_token": "a\nb"},
])  # fmt: skip
def test_settings_of_tokenizers(tokenizer, settings):
    folder = tokenizer()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ValueError, match=r"tokenizer_config.json: got (model_max_length|pad_token) .*expected"
    ) as raised:
        Tokenizer(folder)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("settings", [
    {"tokenizer_class": "EvilTokenizer"}, {"extra_ids": 10**9}, {"extra_ids": "x"},
    {"additional_special_tokens": ["<a>"] * 5000},
])  # fmt: skip
def test_settings_of_a_sentencepiece_model(tmp_path, settings):
    (tmp_path / "spiece.model").write_bytes(b"no model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"got {next(iter(settings))} .*expected a tokenizer"):
        Tokenizer(tmp_path)
