"""Seeded damage to good data: single bytes, and odd values in JSON."""

import copy
import json
from random import Random

NUMBERS = [0, -1, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 1e308, 1e-320, 0.5, float("nan"),
           float("inf")]  # fmt: skip
TEXTS = ["", "\0", "a\nb", "\ud800", "x" * 10_000, "../../etc/passwd", "/dev/zero", "(a+)+$", "a" * 60, "é" * 300,
         "[" * 5000, "__import__('os')", "²", "blocks." + "9" * 4500 + ".attn1.to_q"]  # fmt: skip
OTHERS = [None, True, False, [], {}, [[]], [None] * 3000, {"": {}}, {"a": {"a": {"a": []}}}]


def odd_value(choose: Random):
    return copy.deepcopy(choose.choice(choose.choice([NUMBERS, TEXTS, OTHERS])))


def mutated_json(value, choose: Random, changes: int = 0):
    """A copy with a few of its places replaced, removed, doubled or renamed."""
    root = [copy.deepcopy(value)]
    for _ in range(changes or choose.choice([1, 1, 1, 2, 3, 6])):
        places = []
        waiting = [root]
        while waiting:
            one = waiting.pop()
            keys = list(one) if isinstance(one, dict) else range(len(one))
            places += [(one, key) for key in keys]
            waiting += [one[key] for key in keys if isinstance(one[key], dict | list) and len(places) < 20_000]
        folder, key = choose.choice(places)
        how = choose.randrange(6)
        if how == 0 and folder is not root:
            del folder[key]
        elif how == 1 and isinstance(folder, dict):
            folder[str(odd_value(choose))[:2000]] = folder.pop(key)
        elif how == 2 and isinstance(folder[key], int | float):
            folder[key] = folder[key] + choose.choice([-1, 1, 3, 1 << choose.randrange(64)])
        elif how == 3 and len(places) > 1:
            other, name = choose.choice(places)
            folder[key] = copy.deepcopy(other[name])
        else:
            folder[key] = odd_value(choose)
    return root[0]


def json_bytes(value) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def mutated_bytes(data: bytes, choose: Random, most: int = 1 << 30) -> bytes:
    """A copy with bits flipped, numbers overwritten, pieces removed, moved or doubled; within `most` bytes."""
    found = bytearray(data)
    for _ in range(choose.choice([1, 1, 2, 4, 16])):
        end = max(1, min(len(found), most))
        at, how = choose.randrange(end), choose.randrange(7)
        if how == 0 and found:
            found[at % len(found)] ^= 1 << choose.randrange(8)
        elif how == 1:
            size = choose.choice([1, 2, 4, 8])
            found[at : at + size] = (choose.choice([0, 1, 255, 2**31, 2**63, 2**64 - 1]) % 256**size).to_bytes(
                size, "little"
            )
        elif how == 2:
            del found[at : at + choose.choice([1, 4, 100])]
        elif how == 3:
            found[at:at] = found[at : at + choose.choice([1, 8, 64])]
        elif how == 4:
            other = choose.randrange(end)
            found[at : at + 16] = found[other : other + 16]
        elif how == 5:
            found[at:at] = choose.randbytes(choose.choice([1, 4, 32]))
        elif choose.random() < 0.2:
            del found[at:]
    return bytes(found)
