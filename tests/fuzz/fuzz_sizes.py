"""Texts that are sizes, or nearly: the library's number is that of another parser, or there is an error that says why.

    python tests/fuzz/fuzz_sizes.py --minutes 60           # as long as that, from seed 1
    python tests/fuzz/fuzz_sizes.py --seed 7 --only 1234   # one text again

The flags of the programs are read by the same function of the library.
"""

from __future__ import annotations

import functools
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.sizes import parse_size
from pydantic import ValidationError
from rounds import Isolated, Say, command_line

from superllama import ContextParams, ModelParams
from superllama._sizes import device_sizes, size_bytes

UNITS = {"": 1, "B": 1, "K": 2**10, "KiB": 2**10, "M": 2**20, "MiB": 2**20, "G": 2**30, "GiB": 2**30, "T": 2**40,
         "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # fmt: skip
MOST = 9.2e18
N_DEVICES = 16

NUMBERS = (
    "0", "1", "8", "1.5", ".5", "0.0", "00012", "1e3", "1E+3", "2e-3", "1e-400", "1e308", "1e309", "1e99999999999",
    "4096", "9199999999999999999", "9200000000000000000", "18446744073709551615", "18446744073709551616", "0.1e1",
    "1e18", "0." + "0" * 400 + "1", "9" * 400, "1e-99999999999", "2.5000000000000000001", "5e-324",
)  # fmt: skip
ODD = (
    "", " ", "  ", "\t", "\n", "\0", "-", "+", ".", ",", "e", "E", "e+", "%", "%%", "i", "iB", "auto", "nan", "inf",
    "0x10", "1_000", "1,5", "1'000", "١٢", "１２", "²", "½", "Ⅷ", "८", "\u00a0", "\u2009", "\u200b", "−1",
    "GİB", "ＧｉＢ", "\ud800", "é", "😀", "gib", "GIB", "Gib", "PiB", "KiBi", "bytes", "8GiB", "x" * 5000, "%n%s",
)  # fmt: skip


def text(rng: random.Random) -> str:
    unit = rng.choice((*UNITS, "%", "auto" if rng.random() < 0.1 else "GiB"))
    parts = [rng.choice(NUMBERS), rng.choice(("", "", " ", "  ")), unit]
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 4))):
        at = rng.randrange(len(parts) + 1)
        parts[at : at + rng.choice((0, 0, 1))] = [rng.choice((rng.choice(ODD), rng.choice(NUMBERS), rng.choice(ODD)))]
    whole = "".join(parts)
    if whole and rng.random() < 0.1:
        at = rng.randrange(len(whole))
        letter = chr(rng.choice((rng.randrange(128), rng.randrange(0x300), 0x660 + rng.randrange(10))))
        whole = whole[:at] + letter + whole[at + 1 :]
    return whole


@functools.cache
def all_of_it() -> int:
    return size_bytes("100%")


def expected(size: str, of_memory: bool) -> int | None:
    """What a text stands for, by another way than the library's; None for what is no size."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)((?:[eE][+-]?[0-9]+)?) *([A-Za-z%]*)", size)
    if match is None or not math.isfinite(number := float(match[1] + match[2])):
        return None
    if match[3] == "%":
        return int(number / 100 * all_of_it()) if of_memory and number <= 100 else None
    factor = UNITS.get(match[3])
    return int(number * factor) if factor and number * factor < MOST else None


def found(call: Any, value: Any) -> Any:
    """What a parser makes of a value; None if it refuses, with a reason."""
    try:
        return call(value)
    except ValidationError as e:
        return None if e.errors()[0]["msg"] else "an error without a reason"
    except ValueError as e:
        return None if str(e) else "an error without a reason"


def by_model(size: str) -> int:
    return ModelParams(mem_budget=size).to_c([]).superllama.mem_budget_bytes  # type: ignore[no-any-return]


def by_context(size: str) -> int:
    return ContextParams(kv_budget=size).to_c([], n_ctx=8, n_threads=1).superllama.kv_budget_bytes  # type: ignore[no-any-return]


def by_bench(size: str) -> int | None:
    """bench/ has a parser of its own, which takes other spellings too: where it takes the library's, both agree."""
    theirs = found(parse_size, size)
    ours = expected(size, of_memory=False)
    return ours if theirs is None or ours is None else theirs


def of_devices(given: list[str]) -> list[int] | None:
    """What a list of sizes stands for, each of which may be a list."""
    values = ",".join(given).split(",")
    wanted = [0 if v == "auto" else expected(v, of_memory=False) for v in values]
    sizes = [1 if w == 0 and v != "auto" else w for v, w in zip(values, wanted, strict=True) if w is not None]
    return sizes + sizes[-1:] * (N_DEVICES - len(sizes)) if len(values) == len(sizes) <= N_DEVICES else None


class Sizes:
    def __call__(self, rng: random.Random, say: Say) -> tuple[str, str]:
        value = text(rng)
        say(repr(value)[:300])
        want = 0 if value == "auto" else expected(value, of_memory=True) or None
        for call in (size_bytes, by_model, by_context):
            if (got := found(call, value)) != want:
                return "disagrees", f"{call.__name__}: {got!r} instead of {want!r}"
        plain = expected(value, of_memory=False)
        if (got := found(by_bench, value)) != plain:
            return "disagrees", f"bench: {got!r} instead of {plain!r}"
        devices = [value] + [text(rng) for _ in range(rng.choice((0, 0, 0, 1, 3, N_DEVICES - 1, N_DEVICES)))]
        if (got := found(device_sizes, devices)) != (several := of_devices(devices)):
            return "disagrees", f"device_sizes({devices!r}): {got!r} instead of {several!r}"
        return ("refused", "") if want is None else ("ok", "")


def fuzzer(seed: int, folder: Path) -> Isolated:
    return Isolated(seed, folder, Sizes)


if __name__ == "__main__":
    sys.exit(command_line(__doc__, fuzzer))
