"""How methods, benchmarks, numbers and untrusted text are written in a report."""

import json
import unicodedata
from functools import cache
from importlib import resources
from typing import Any, Literal

Kind = Literal["method", "selftrained", "untrained", "baseline", "supervised", "bound"]

# Order in which kinds stand in a table.
KINDS: dict[str, str] = {
    "method": "Trained here",
    "selftrained": "Self-trained on the benchmark's own training images (transductive, closed vocabulary)",
    "untrained": "The same, untrained",
    "baseline": "Baselines",
    "supervised": "Supervised with the true masks of the training images (closed vocabulary)",
    "bound": "Upper bounds (they read the true masks)",
}
# What is said behind the name of a method of that kind, where a table has no groups.
MARKS: dict[str, str] = {"selftrained": "transductive", "supervised": "supervised", "bound": "upper bound"}
# Kinds that know nothing of the benchmark but its class names (and, tuned, a threshold): zero-shot.
FAIR = ("method", "untrained", "baseline")
MISSING = "–"


@cache
def published() -> dict[str, Any]:
    """The papers' own figures and the display names, as `paper.json` holds them; mIoU in percent."""
    return json.loads(resources.files("pipeline.reporting").joinpath("paper.json").read_text(encoding="utf-8"))


def kind(method: str) -> Kind:
    """What a metrics folder's name says about it.

    `sseg`, `sseg-untrained`, `baseline-constant`, `baseline-oracle`, `selftrained-sseg`, `transfer-dino`.
    """
    if method.startswith("selftrained-"):
        return "selftrained"
    if method.startswith("transfer-"):
        return "supervised"
    if "oracle" in method:
        return "bound"
    if method.startswith("baseline-"):
        return "baseline"
    return "untrained" if method.endswith("-untrained") else "method"


def method_title(method: str) -> str:
    """Display name of a metrics folder; an unknown name stands as it is."""
    known = published()["methods"]
    if method in known:
        return known[method]["title"]
    if method.endswith("-untrained"):
        return f"{method_title(method.removesuffix('-untrained'))}, untrained"
    if method.startswith("selftrained-"):
        return f"{method_title(method.removeprefix('selftrained-'))}, self-trained"
    if method.startswith("transfer-"):
        return f"{method.removeprefix('transfer-').upper()} and a 1x1 head"
    return clean(method.removeprefix("baseline-").replace("_", " "))


def benchmark_title(benchmark: str) -> str:
    """Display name of a benchmark; an unknown name stands as it is."""
    return published()["benchmarks"].get(benchmark, {}).get("title", clean(benchmark))


def clean(text: Any) -> str:
    """Untrusted text on one line: control, bidirectional-override and unpaired surrogate characters become U+FFFD.

    An override would turn the text that follows it around; right-to-left letters and emoji stay as they are.
    """
    flat = " ".join(str(text).split())
    return "".join("\ufffd" if _harmful(character) else character for character in flat)


def _harmful(character: str) -> bool:
    overrides = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    return overrides or unicodedata.category(character) in ("Cc", "Cs")


def points(value: float | None) -> str:
    """A percentage with one decimal, without the sign; an absent value is a dash."""
    return MISSING if value is None else f"{value:.1f}"


def interval(value: tuple[float, float] | None) -> str:
    """Both ends of a range of percentages."""
    return MISSING if value is None else f"{value[0]:.1f}–{value[1]:.1f}"


def change(value: float | None) -> str:
    """A difference in percentage points with its sign; zero after rounding carries none."""
    if value is None:
        return MISSING
    return "±0.0" if f"{abs(value):.1f}" == "0.0" else f"{value:+.1f}".replace("-", "−")


def short(number: int) -> str:
    """A count in at most five characters: 9,999, 10k, 1.0M, 23.4M."""
    if number < 10_000:
        return count(number)
    return f"{number / 1e3:.0f}k" if number < 999_500 else f"{number / 1e6:.1f}M"


def count(value: int | float) -> str:
    """An integer with thin groups: 12,345."""
    return f"{value:,.0f}"


def size(value: int | float) -> str:
    """Bytes in decimal units, three figures."""
    number = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def duration(seconds: float) -> str:
    """Seconds as `0.4 s`, `12 s`, `3 min 20 s` or `2 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def describe(value: Any) -> str:
    """A JSON value of a protocol in words: mappings as `key value`, lists joined, long lists counted."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{clean(key)} {describe(item)}" for key, item in sorted(value.items()))
    if isinstance(value, list | tuple):
        if len(value) > 3:
            return f"{len(value)} of them, first {describe(value[0])}"
        return " / ".join(describe(item) for item in value) or "none"
    return f"{value:g}" if isinstance(value, float) else clean(value)
