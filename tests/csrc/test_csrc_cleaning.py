"""The C++ core cleans prompts as diffusers' WanPipeline with ftfy does, in bounded time, and refuses the same ones."""

import importlib.util
import json
import random
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from itertools import product
from pathlib import Path

import ftfy
import pytest
from csrc_tools import HANG
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from diffusers.utils import is_ftfy_available
from texts.garbled import TEXTS, garbled

from engine.model.text import MOST_CHARACTERS, MOST_GARBLED, check_prompt, clean_prompt, is_blank

ROOT = Path(__file__).parents[2]
COUNT = 40_000


def run(build: Path, prompts: list[str]) -> list[str]:
    lines = "".join(json.dumps(text) + "\n" for text in prompts)
    ran = subprocess.run([build / "cleaned"], input=lines, capture_output=True, text=True, timeout=HANG)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == len(prompts)
    return ran.stdout.splitlines()


def text_of(line: str) -> str:
    assert not line.startswith("error"), line
    return bytes.fromhex(line.removeprefix("*")).decode()


def same_as_diffusers(build: Path, prompts: list[str]) -> None:
    assert is_ftfy_available()  # without it diffusers cleans otherwise
    for prompt, line in zip(prompts, run(build, prompts), strict=True):
        expected = prompt_clean(prompt)
        assert text_of(line) == expected, ascii(prompt)
        assert line.startswith("*") == is_blank(expected), ascii(prompt)


CASES = {
    "curly quotes": ("“a ‘red’ circle”", "\"a 'red' circle\""),
    "ligatures": ("ﬁne ﬂower oﬃce Ĳ ǆ", "fine flower office IJ dž"),
    "full width": ("ＲＥＤ　ｃｉｒｃｌｅ １", "RED circle 1"),
    "half width": ("ｶﾞ ﾊﾟ", "ガ パ"),
    "garbled once": ("cafÃ© dÃ©jÃ\xa0 vu", "café déjà vu"),
    "garbled twice": ("cafÃƒÂ©", "café"),
    "garbled emoji": ("ðŸ˜€ red", "😀 red"),
    "garbled in a text that is not": ("слово â€œquotedâ€\x9d слово", 'слово "quoted" слово'),
    "a lost byte": ("â€œ like this â€�", '" like this �'),
    "a lost space": ("voilÃ le travail", "voilà le travail"),
    "windows-1251": ("РїСЂРёРІРµС‚", "привет"),
    "macroman": ("na√Øve caf√©", "naïve café"),
    "C1 controls": ("it\x92s \x93red\x94", 'it\'s "red"'),
    "entities": ("P&EACUTE;REZ &amp;amp; &hellip; &#233; &copy 2026", "PÉREZ & … é © 2026"),
    "entities beside tags": ("<b> &eacute;", "<b> é"),
    "terminal escapes": ("\x1b[1;31mred\x1b[0m circle", "red circle"),
    "control characters": ("re\0d\x07 \ufeffcir\x7fcle\ufffc", "red circle"),
    "line breaks": ("a\r\nb\rc\u2028d\u2029e", "a b c d e"),
    "composed": ("e\u0301 \u212b \u1112\u1161\u11ab", "é Å 한"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_of_every_kind(native_build, name):
    prompt, expected = CASES[name]
    assert prompt_clean(prompt) == expected
    assert text_of(run(native_build, [prompt])[0]) == expected
    assert clean_prompt(prompt) == expected


def test_texts_in_many_languages_stay(native_build):
    prompts = [unicodedata.normalize("NFC", text) for text in TEXTS]
    assert sum(ftfy.fix_encoding(text) != text for text in prompts) == 0
    same_as_diffusers(native_build, prompts)


@pytest.mark.slow
def test_garbled_and_odd_prompts(native_build):
    choose = random.Random(0)
    prompts = [garbled(choose) for _ in range(COUNT)]
    assert sum(ftfy.fix_encoding(text) != text for text in prompts[:1000]) > 300
    same_as_diffusers(native_build, prompts)


def test_every_character(native_build):
    """Alone, before an accent and behind a letter; a line each, so that none changes another's reading."""
    codes = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and unicodedata.name(chr(code), "")]
    several = ["\n".join(f"a{char}\u0301 {char}" for char in codes[at : at + 50]) for at in range(0, len(codes), 50)]
    same_as_diffusers(native_build, several)


def test_the_end_of_a_line_stands_in_for_a_byte(native_build):
    """ftfy's patterns end in $, which matches before a last line feed."""
    for garble in ("í\xa0½í¸\n", "À\n", "í\n", "í\xa0½í\n", "é À\n"):
        same_as_diffusers(native_build, [garble, "Ã©" + garble, garble + "a"])


def test_every_short_sequence_of_bytes_that_were_lost_or_became_spaces(native_build):
    """Behind a garbled letter, so that the text counts as garbled. ^Z is a lost byte in the sloppy encodings."""
    few, more = b"\xe2\xe0\xf0\xc3\xa0\x85\x80 \x1aa", b"\xe3\xe1\xed\xc2\xdf\x9f\xbf?s\n"
    parts = [*product(few + more, repeat=3), *product(few, repeat=4)]
    prompts = [("\xc3\xa9".encode("latin-1") + bytes(part)).decode("sloppy-windows-1252") for part in parts]
    same_as_diffusers(native_build, prompts)


N = MOST_CHARACTERS
WORST = {
    "many ampersands": "&" * N,
    "ampersands apart": "& " * (N // 2),
    "long names": ("&" + "a" * 32) * (N // 33),
    "escapes": "\x1b[" * (N // 2),
    "one escape of digits": "\x1b[" + "1" * (N - 2),
    "nested escapes": "\x1b[" * (N // 4) + "0m" * (N // 4),
    "hexadecimal digits": "&#x" + "1" * (N - 4) + ";",
    "spaces": " " * N,
    "words": "red " * (N // 4),
    "one word": "a" * N,
    "Chinese": "红" * N,
    "letters of no vocabulary": "\u0e01" * N,
    "Hangul letters": "\u1100\u1161\u11a8" * (N // 3),
    "letters that become eighteen": "\ufdfa" * N,
    "special tokens": "<pad> " * (N // 6),
    "emoji": "😀" * N,
}
REFUSED = {
    "nested entities": "&" + "amp;" * (N // 4 - 1),
    "nested entities of full width": "＆" + "ａｍｐ；" * (N // 4 - 1),
    "garbled again and again": "Ã" + "ƒ" * (N // 2),
    "the same in lines": ("Ã" + "ƒ" * 100 + "\n") * (N // 200),
    "combining marks": "a" + "\u0301\u0316" * (N // 4),
    "a number": "&#" + "1" * (N - 3) + ";",
}
TOO_LONG = {
    "one more": "a" * (N + 1),
    "one more of four bytes": "😀" * (N + 1),
    "plain": "red " * 250_000,
    "ampersands": "&" * 40_000,
    "entities": "&amp;" * 1_000_000,
    "garbled": "Ã" + "ƒ" * 1_000_000,
    "marks": "\u0301" * 1_000_000,
    "spaces": " " * 1_000_000,
}


@pytest.mark.parametrize("name", WORST)
def test_the_longest_prompt_takes_no_second(native_build, name):
    begun = time.monotonic()
    line = run(native_build, [WORST[name]])[0]
    assert time.monotonic() - begun < 5  # a loaded machine is slow; quadratic time would be longer by far
    assert text_of(line) == clean_prompt(WORST[name])


@pytest.mark.parametrize("name", REFUSED)
def test_a_prompt_that_ftfy_would_take_minutes_for_is_refused_alike(native_build, name):
    begun = time.monotonic()
    line = run(native_build, [REFUSED[name]])[0]
    with pytest.raises(ValueError, match=r"^prompt: got .*expected") as raised:
        clean_prompt(REFUSED[name])
    assert line == f"error: {raised.value}"
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("name", TOO_LONG)
def test_a_longer_prompt_is_refused_alike_before_it_is_read(native_build, name):
    prompt = TOO_LONG[name]
    said = f"prompt: got {len(prompt)} characters, expected at most {N}"
    assert run(native_build, [prompt]) == [f"error: {said}"]
    with pytest.raises(ValueError, match=f"^{said}$"):
        clean_prompt(prompt)
    with pytest.raises(ValueError, match=f"^{said}$"):
        check_prompt(prompt)


def test_a_refused_prompt_costs_no_memory():
    prompt = "😀" * 10_000_000
    tracemalloc.start()
    with pytest.raises(ValueError, match="expected at most"):
        check_prompt(prompt)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("unit", ["&amp;", "Ã©"])
def test_the_longest_garbled_prompt(native_build, unit):
    prompt = ("red " * MOST_GARBLED)[: MOST_GARBLED - len(unit)] + unit
    same_as_diffusers(native_build, [prompt])
    assert clean_prompt(prompt) == prompt_clean(prompt)
    assert run(native_build, ["a" + prompt])[0].startswith(f"error: prompt: got {MOST_GARBLED + 1} characters")


def test_the_deepest_nesting_takes_no_second(native_build):
    begun = time.monotonic()
    deepest = "Ã" + "ƒ" * (MOST_GARBLED - 1)
    assert text_of(run(native_build, [deepest])[0]) == "Ã"
    assert time.monotonic() - begun < 5


@pytest.mark.thorough
def test_tables_of_cleaning_are_current():
    folder = ROOT / "csrc" / "text"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("cleaning_tables", folder / "cleaning_tables.py")
        tables = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tables)
    finally:
        sys.path.remove(str(folder))
    head = (folder / "normal_tables.inc").read_text(encoding="utf-8").splitlines()[0]
    if f"Unicode {tables.UNICODE};" not in head:
        pytest.skip(f"this Python has Unicode {tables.UNICODE}, the tables were written with another one: {head}")
    for file, content in tables.texts().items():
        assert file.read_text(encoding="utf-8") == content
