"""Prompts that cleaning changes: garbled in every way that ftfy knows, and with every kind of odd character."""

import random

from ftfy import chardata
from ftfy.badness import MOJIBAKE_CATEGORIES

TEXTS = """La voilà, déjà l'été où ça brûle — «garçon» naïf cœur Œuvre
Überraschung: größer, Straße „schön“ süß
¿Qué pasó mañana? ¡El niño está aquí! 50 €
às vezes não é à noite àquele lugar àquilo
Привет, мир! Съешь ещё этих мягких французских булок — «да» №5
Καλημέρα κόσμε, πώς είσαι; Ελλάδα ΰ ώ
Żółta łódź płynie Źdźbło ąęśćńó
İstanbul'da güneşli ğüşöç ı
Ąžuolas šviečia ėįųū
中文视频：红色的圆圈慢慢移动。“你好”
日本語テレビ ｶﾞ ﾊﾟ「こんにちは」
한국어 각도 조정 각
مرحبا بالعالم ٠١٢ שלום עולם
สวัสดีชาวโลก ก็ हिन्दी किताब Tiếng Việt ở đây ệ
emoji 😀 👩‍👩‍👧 🇩🇪 ✔️ ❤️ 🏴󠁧󠁢󠁷󠁬󠁳󠁿
“curly” ‘quotes’ ʼn … – — ™ ® © ° µ ½ ² ³ × ÷
ﬁne ﬂow ﬀ ﬃ ﬄ ﬅ ﬆ ĳ Ǆ ǅ ǆ ŉ
ＦＵＬＬ　ｗｉｄｔｈ ￥ ￠ ￡ ＆ａｍｐ；
│┌┐└ ═║╔ ▀▄█ ░▒▓ √± ≈° ≤ ≥ ∂ ∑ ∞ ∫ ∆ Ω π""".splitlines()
OTHERS = [
    "sloppy-windows-1255", "sloppy-windows-1256", "sloppy-cp874", "cp850", "cp866", "koi8-r", "shift_jis", "gbk",
    "big5", "iso-8859-15",
]  # fmt: skip
ODD = [
    *map(chr, range(0x80, 0x180)),
    *"\ufffd\x1a? \xa0\n\r\u2028\x85[;<>&\0\x0b\x0c\x1c\x7f\ufeff\u200b\u206a\ufff9",
    "\x1b[0m", "\x1b[1;31mX", "\x1b[٣m", "\x1b", "1;", "&amp;", "amp;", "&lt;", "&EACUTE;", "&eacute;", "&nbsp;",
    "&#59;", "&#xE9;", "&#233;", "&#x80;", "&#0;", "&#", "&notit;", "\u0301", "\u0316", "\u0327", "\u1100", "\u1161",
    "\u11a8", "\u212b", "\u037e", "\u0340", "\u0344", "\u0958", "\u2adc", "\U0001d15e", "\ufb1d", "\u0f73",
    "\u0b47\u0b56", "\u0dd9\u0dcf\u0dca", "\uff61", "\uff9e", "\uff76", "\uffa1", "\u3000", "\ufffc",
]  # fmt: skip
CLUES = [char for group in (*MOJIBAKE_CATEGORIES.values(), *chardata.UTF8_CLUES.values()) for char in group]
LEADS = [*b"\xc2\xc3\xe2\xe0\xed\xf0\xc0", *b"\xa0\x80\x9f\xbf\xb0", *b" \x1a?\nA"]


def cesu8(text: str) -> bytes:
    """Each half of a surrogate pair as three bytes."""
    units = text.encode("utf-16-be", "surrogatepass")
    return b"".join(chr(units[i] << 8 | units[i + 1]).encode("utf-8", "surrogatepass") for i in range(0, len(units), 2))


def garble(choose: random.Random, text: str, times: int) -> str:
    """Encode the text and decode it with another encoding, so often; some bytes are lost on the way, as in the wild."""
    for _ in range(times):
        kind = choose.random()
        try:
            data = cesu8(text) if kind < 0.08 else text.encode("utf-8" if kind < 0.8 else choose.choice(OTHERS))
            if choose.random() < 0.15:
                data = data.replace(b"\xa0", b" ").replace(b"\0", b"\xc0\x80")
            encoding = choose.choice(OTHERS if choose.random() < 0.1 else chardata.CHARMAP_ENCODINGS)
            text = data.decode(encoding, "replace" if choose.random() < 0.3 else "strict")
        except UnicodeError:
            continue
        if choose.random() < 0.05:
            text = text.replace("\ufffd", "?")
    return text


def piece(choose: random.Random) -> str:
    text = choose.choice(TEXTS)
    begin = choose.randrange(len(text))
    return text[begin : begin + choose.randint(1, 14)]


def garbled(choose: random.Random) -> str:
    """One prompt, without surrogates."""
    kind = choose.random()
    if kind < 0.3:
        whole = "".join(piece(choose) + choose.choice(["", " ", "\n"]) for _ in range(choose.randint(1, 4)))
        text = garble(choose, whole, choose.choice([1, 1, 1, 2, 2, 3]))
    elif kind < 0.5:
        parts = choose.randint(1, 6)
        text = " ".join(garble(choose, piece(choose), choose.choice([0, 0, 1, 1, 2])) for _ in range(parts))
    elif kind < 0.65:
        text = "".join(choose.choices(ODD, k=choose.randint(0, 14)))
    elif kind < 0.75:
        text = "".join(choose.choices([*CLUES, "a", "Z", ".", " "], k=choose.randint(1, 12)))
    elif kind < 0.85:
        data = bytes(choose.choice([*LEADS, choose.randrange(256)]) for _ in range(choose.randint(1, 10)))
        text = data.decode(choose.choice(chardata.CHARMAP_ENCODINGS), "replace")
    else:
        last = choose.choice([0x500, 0x3000, 0x10000, 0x110000])
        codes = (choose.randrange(last) for _ in range(choose.randint(1, 16)))
        text = "".join(choose.choice(ODD) if choose.random() < 0.3 else chr(code) for code in codes)
    return "".join(char for char in text if not 0xD800 <= ord(char) < 0xE000)
