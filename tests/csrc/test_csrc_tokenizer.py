"""The C++ core's tokens are those of engine.text (transformers' tokenizers), and it refuses what it does not know."""

import importlib.util
import json
import random
import subprocess
from io import BytesIO
from pathlib import Path

import pytest
from csrc_tools import HANG
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from texts.garbled import garbled
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from engine.model.text import MOST_CHARACTERS
from engine.model.text import Tokenizer as Engine

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "engine" / "assets" / "sprites" / "tokenizer"
COUNT = 10_000
TEXT = """a red circle moving right slowly on gray background teal Square İstanbul ﬁne Ⅷ naïve ２０２６ ½ किताब क्षि ก็ ทำ
    up down left and white black quickly triangle yellow
    한국어 각 e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467 🇩🇪🇫🇷 ﷺ ǆ ß ẞ Σς x&amp;lt;y &#8482; &#x80; &notit;
    &copy; </s> <unk> <pad> ｱｲｳ ガ ﾊﾞ Å ① ™ … \u200b \ufeff \u00ad “red” ‘blue’ ﬂat ＧＲＡＹ
    cafÃ© naÃ¯ve â€œa circleâ€\x9d &EACUTE; it\x92s \x1b[1mred\x1b[0m"""
WORDS = [*TEXT.split(), "\u00a0", "\u2003", "\u3000"]


def prompt(choose: random.Random) -> str:
    """Words, letters of many scripts, any characters at all, and what HTML and special tokens are made of."""
    kind, length = choose.random(), choose.randint(0, 16)
    if kind < 0.55:
        return (" " if kind < 0.35 else "").join(choose.choices(WORDS, k=length))
    if kind < 0.75:
        blocks = [(0x20, 0x250), (0x20, 0x3000), (0x300, 0x370), (0x900, 0xE00), (0x1100, 0x1200)]
        return "".join(chr(choose.randrange(*choose.choice(blocks))) for _ in range(length))
    if kind < 0.82:
        return garbled(choose)
    if kind < 0.9:
        codes = (choose.randrange(1, 0x110000) for _ in range(length))
        return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
    return "".join(choose.choice("ab c\t\n<>/sunkpad&;#x1e") for _ in range(2 * length))


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    choose = random.Random(0)
    return [
        "",
        " ",
        "a" * 5000,
        "“red”" * 500,
        "\u0e01" * MOST_CHARACTERS,
        "<pad> " * (MOST_CHARACTERS // 6),
        *(prompt(choose) for _ in range(COUNT)),
    ]


def tokens(build: Path, folder: Path, given: list[str]) -> subprocess.CompletedProcess[str]:
    lines = "".join(json.dumps(text) + "\n" for text in given)
    return subprocess.run([build / "tokens", folder], input=lines, capture_output=True, text=True, timeout=HANG)


def same_tokens(build: Path, folder: Path, given: list[str]) -> None:
    ran = tokens(build, folder, given)
    assert ran.returncode == 0, ran.stderr
    engine, lines = Engine(folder), ran.stdout.splitlines()
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.no_truncation(), theirs.no_padding()
    room = engine.rows - 1  # before the end mark
    assert len(lines) == len(given)
    seen = set()
    for text, line in zip(given, lines, strict=True):
        ids, mask = engine(text)
        # Not by engine.model.text alone: diffusers cleans, and tokenizers reads the file.
        assert theirs.encode(prompt_clean(text)).ids[:room] == ids[0, :room][mask[0, :room] == 1].tolist(), ascii(text)
        used, *got = map(int, line.split())
        assert (used, got) == (int(mask.sum()), ids[0].tolist()), ascii(text)
        seen.update(got)
    assert len(seen) > 20  # not all unknown


def save(folder: Path, tokenizer: Tokenizer) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, "pad_token": "<pad>",
              "eos_token": "</s>", "unk_token": "<unk>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def sentencepiece_model():
    """Pieces, scores and the compiled rules (nmt_nfkc) of a small SentencePiece model: the kind that UMT5 has."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    from transformers.convert_slow_tokenizer import import_protobuf

    choose = random.Random(1)
    letters = "abcdefghijklmnop éüñ中文字ひらカナ"
    words = ["".join(choose.choices(letters, k=choose.randint(1, 8))) for _ in range(3000)]
    lines, written = [" ".join(choose.choices(words, k=8)) for _ in range(2000)], BytesIO()
    trainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=400, model_type="unigram", bos_id=-1,
        normalization_rule_name="nmt_nfkc", pad_id=0, eos_id=1, unk_id=2, minloglevel=2,
    )  # fmt: skip
    model = import_protobuf().ModelProto()
    model.ParseFromString(written.getvalue())
    return [(piece.piece, piece.score) for piece in model.pieces], model.normalizer_spec.precompiled_charsmap


def unigram(vocab: list[tuple[str, float]], normalizer, pre_tokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=False))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return tokenizer


def test_the_embedded_models_tokens(native_build, prompts):
    same_tokens(native_build, EMBEDDED, prompts)


@pytest.mark.parametrize("kind", ["umt5", "t5", "plain"])
def test_sentencepiece_tokens(native_build, sentencepiece_model, prompts, tmp_path, kind):
    """umt5: as the published tokenizer.json has it; t5: as transformers rebuilds it for its T5 class."""
    vocab, rules = sentencepiece_model
    compiled = normalizers.Precompiled(rules)
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never" if kind == "plain" else "always")
    folds = [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    tokenizer = {
        "umt5": lambda: unigram(vocab, normalizers.Sequence([compiled, *folds]), metaspace),
        "t5": lambda: unigram(vocab, compiled, pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])),
        "plain": lambda: unigram(vocab, normalizers.Replace("ab", "c d"), metaspace),
    }[kind]()
    same_tokens(native_build, save(tmp_path / kind, tokenizer), prompts if kind == "umt5" else prompts[:3000])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update(normalizer={"type": "NFC"}), "normalizer NFC"),
        (lambda t: t.update(pre_tokenizer={"type": "ByteLevel"}), "pre_tokenizer ByteLevel"),
        (lambda t: t["model"].update(type="BPE"), "model BPE"),
        (lambda t: t.update(post_processor={"type": "RobertaProcessing"}), "another post_processor"),
        (lambda t: t["added_tokens"][0].update(normalized=True), "that is normalized"),
        (lambda t: t["model"].update(unk_token="nowhere"), "unk_token outside"),
    ],
)
def test_another_kind_is_refused(native_build, tmp_path, change, said):
    content = json.loads((EMBEDDED / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_bytes((EMBEDDED / "tokenizer_config.json").read_bytes())
    ran = tokens(native_build, tmp_path, ["a"])
    assert ran.returncode == 1
    assert said in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.slow
def test_tables_of_characters_are_current():
    spec = importlib.util.spec_from_file_location("text_tables", ROOT / "csrc" / "text" / "text_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.OUT.read_text(encoding="utf-8") == tables.text()
