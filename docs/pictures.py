"""Draw the pictures of docs/how.md: docs/pictures/*.svg.

    python docs/pictures.py

They are 400 units wide, so that words stay legible on a telephone. They have their own background,
and follow the reader's choice of light or dark. tests/test_docs_pages.py compares the files with
this script.
"""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "pictures"
WIDTH = 400
STYLE = """
  :root { --back: #ffffff; --ink: #1f2430; --soft: #5b6472; --float: #e3e8f8; --bits: #d8f0e4;
          --line: #9aa3b5; --on: #1d7a50; --off: #e8ebf1; --off-ink: #1f2430; --mark: #b3471d; }
  @media (prefers-color-scheme: dark) {
    :root { --back: #1c1f2a; --ink: #eceff6; --soft: #aab2c2; --float: #2f3a5c; --bits: #1f4a3a;
            --line: #6c7690; --on: #2f9d6c; --off: #343a4b; --off-ink: #eceff6; --mark: #ff9a6c; }
  }
  text { font: 14px system-ui, "DejaVu Sans", sans-serif; fill: var(--ink); }
  .soft { fill: var(--soft); font-size: 12.5px; }
  .code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px; }
  .mark { fill: var(--mark); }
  .white { fill: #ffffff; }
  .back { fill: var(--back); }
  .float { fill: var(--float); stroke: var(--line); }
  .bits { fill: var(--bits); stroke: var(--line); }
  .on { fill: var(--on); }
  .off { fill: var(--off); }
  .off-ink { fill: var(--off-ink); }
  line, path { stroke: var(--line); stroke-width: 1.5; fill: none; }
  line.marked { stroke: var(--mark); stroke-width: 2; }
"""

ACTIVATIONS = (0.7, -1.2, 0.1, -0.4, 2.0, -0.3, 0.9, 0.0)
WEIGHTS = (0.2, -0.1, -0.5, -0.3, 0.4, 0.6, -0.7, 0.1)


def words(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" class="{kind}"/>'
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "") -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>'


def arrow(x: float, top: float, bottom: float) -> str:
    head = f"M {x - 4:g} {bottom - 6:g} L {x:g} {bottom:g} L {x + 4:g} {bottom - 6:g}"
    return line(x, top, x, bottom) + f'<path d="{head}"/>'


def picture(height: float, title: str, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
            f'width="{WIDTH}" height="{height:g}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            box(0, 0, WIDTH, height, "back"),
            *parts,
            "</svg>\n",
        ]
    )


STEPS = (
    ("float", "image", "[N, 3, 32, 32] float32"),
    ("float", "first convolution, BatchNorm", "real inputs, real weights: stays float"),
    ("bits", "sign: value >= threshold", "1 bit for each value"),
    ("bits", "pack", "32 channels of a pixel in an int32 word"),
    ("bits", "xor with packed weights, popcount", "counts the positions that differ"),
    ("bits", "accumulator", "an integer: K - 2 * popcount"),
    ("float", "epilogue", "multiplier * sum + bias, residual, clamp"),
    ("bits", "next sign", "bits for the next layer; floats from the last"),
    ("float", "mean over the pixels, linear layer", "stays float"),
    ("float", "logits", "[N, 10] float32"),
)


def bit() -> str:
    """Draw the way from a pixel to a logit."""
    parts, height, gap, left, width = [], 48, 18, 16, 310
    tops = [16 + i * (height + gap) for i in range(len(STEPS))]
    for top, (kind, what, how) in zip(tops, STEPS, strict=True):
        parts += [box(left, top, width, height, kind)]
        parts += [words(left + 14, top + 21, what), words(left + 14, top + 39, how, "soft")]
    middle = left + width / 2
    parts += [arrow(middle, top + height + 2, top + height + gap - 2) for top in tops[:-1]]
    first, last = tops[4] + height / 2, tops[7] + height / 2
    right, far = left + width, left + width + 26
    tip, end = right + 2, right + 8
    parts += [
        f'<path d="M {right} {last:g} H {far} V {first:g} H {tip}"/>',
        f'<path d="M {end} {first - 4:g} L {tip} {first:g} L {end} {first + 4:g}"/>',
        words(far + 6, (first + last) / 2 - 4, "each", "soft"),
        words(far + 6, (first + last) / 2 + 12, "layer", "soft"),
    ]
    bottom = tops[-1] + height + 16
    legend = [box(left, bottom, 14, 14, "bits"), words(left + 20, bottom + 12, "on bits", "soft")]
    legend += [box(left + 90, bottom, 14, 14, "float")]
    legend += [words(left + 110, bottom + 12, "in float", "soft")]
    return picture(bottom + 30, "A bit's way from the pixel to the logit", parts + legend)


def cells(top: float, values: Sequence[str], filled: Sequence[bool] | None) -> list[str]:
    """Draw a row of eight cells; a filled one is a bit that is 1."""
    parts = []
    for i, value in enumerate(values):
        x, on = 98 + 36 * i, filled is not None and filled[i]
        parts.append(box(x, top, 32, 26, "on" if on else "off"))
        parts.append(
            words(x + 16, top + 18, value, "code white" if on else "code off-ink", "middle")
        )
    return parts


def word() -> str:
    """Draw the dot product of eight signs as xor and popcount."""
    a, w = ([v >= 0 for v in values] for values in (ACTIVATIONS, WEIGHTS))
    differ = [x != y for x, y in zip(a, w, strict=True)]
    count, size = sum(differ), len(a)
    signs = sum((1 if x else -1) * (1 if y else -1) for x, y in zip(a, w, strict=True))
    rows: tuple[tuple[str, Sequence[str], Sequence[bool] | None], ...] = (
        ("activation", [f"{v:g}" for v in ACTIVATIONS], None),
        ("its bit", [str(int(v)) for v in a], a),
        ("weight", [f"{v:g}" for v in WEIGHTS], None),
        ("its bit", [str(int(v)) for v in w], w),
        ("xor", [str(int(v)) for v in differ], differ),
    )
    parts, top = [], 16
    for label, values, filled in rows:
        parts += [words(14, top + 18, label, "soft"), *cells(top, values, filled)]
        top += 34 if label in ("activation", "weight") else 46
    parts += [
        words(14, top + 12, f"popcount = {count}", "code"),
        words(14, top + 34, f"sum of products = {size} - 2 * {count} = {signs}", "code"),
    ]
    return picture(top + 52, "A sum of eight products of signs, by xor and popcount", parts)


def threshold() -> str:
    """Draw how BatchNorm and the next sign become one comparison of an integer."""
    multiplier, bias, size = 0.5, -1.2, 8
    values = [multiplier * total + bias for total in range(-size, size + 1, 2)]
    least = min(t for t, v in zip(range(-size, size + 1, 2), values, strict=True) if v >= 0)
    left, step, axis = 40, 40, 150
    parts = [
        words(14, 26, "BatchNorm: v = 0.5 * sum - 1.2", "code"),
        words(14, 48, "next bit: v >= 0", "code"),
    ]
    for i, (total, value) in enumerate(zip(range(-size, size + 1, 2), values, strict=True)):
        x, on = left + step * i, value >= 0
        parts.append(box(x - 16, 78, 32, 26, "on" if on else "off"))
        parts.append(words(x, 96, str(int(on)), "code white" if on else "code off-ink", "middle"))
        parts.append(line(x, axis - 4, x, axis + 4))
        parts.append(words(x, axis + 22, str(total), "code", "middle"))
        parts.append(words(x, 126, f"{value:.1f}", "soft", "middle"))
    cut = left + step * ((least + size) / 2 - 0.5)
    parts += [
        line(left - 20, axis, left + step * size + 20, axis),
        line(cut, 66, cut, axis + 28, "marked"),
        words(14, axis + 52, f"The same bit: sum >= {least}", "mark"),
        words(14, axis + 72, "The engine compares the integer, and needs no float.", "soft"),
    ]
    return picture(axis + 88, "BatchNorm and sign are one comparison of the integer sum", parts)


PICTURES: dict[str, Callable[[], str]] = {"bit": bit, "word": word, "threshold": threshold}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
