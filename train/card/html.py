"""Parts of a page: elements with everything escaped, tables, pictures, small histograms.

What is made is well-formed as XML too, so that any parser reads it.
"""

import base64
import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

# What XML cannot hold, even escaped.
UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
WIDTH, HEIGHT = 160, 44

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --words: #1c2024; --quiet: #60646c;
  --line: #e0e1e6; --panel: #f6f7f9; --accent: #0d74ce; --good: #1a7f46; --bad: #c62a2f; }
@media (prefers-color-scheme: dark) { :root { --ground: #14161a; --words: #e6e8eb;
  --quiet: #9ba1a9; --line: #30343b; --panel: #1c1f25; --accent: #5cb0ff; --good: #4cc38a;
  --bad: #ff8589; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--ground);
  color: var(--words); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
p, ul { margin: .5rem 0; max-width: 46rem; }
ul { padding-left: 1.25rem; }
.quiet, caption { color: var(--quiet); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; }
caption { text-align: left; padding: .25rem 0; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.words { min-width: 12rem; overflow-wrap: anywhere; }
code, pre { font: .85rem/1.45 ui-monospace, monospace; }
pre { background: var(--panel); padding: .75rem; border-radius: 6px; overflow-x: auto;
  overflow-wrap: normal; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
figure { margin: 1rem 0; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); }
.grid div { background: var(--panel); border-radius: 6px; padding: .6rem; font-size: .85rem; }
.grid b { display: block; }
.big { font-size: 1.4rem; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; margin: .3rem 0; }
svg rect { fill: var(--accent); }
.accepted { color: var(--good); } .refused, .undecided { color: var(--bad); }
.bar { display: block; height: .55rem; min-width: 1px; background: var(--accent);
  border-radius: 2px; }
.track { display: block; width: 6rem; margin-top: .45rem; background: var(--panel); }
"""


class Markup(str):
    """Text that is markup already."""


def escaped(value: Any) -> Markup:
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(UNPRINTABLE.sub("\ufffd", str(value))))


def tag(element: str, /, *children: Any, **attributes: Any) -> Markup:
    """Return an element. Children that are no markup are escaped; `class_` is class."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
    )
    if element in ("img", "meta", "rect"):
        return Markup(f"<{element}{given}/>")
    return Markup(f"<{element}{given}>{joined(children)}</{element}>")


def joined(children: Iterable[Any]) -> Markup:
    return Markup("".join(map(escaped, children)))


def section(title: str, *children: Any) -> Markup:
    return tag("section", tag("h2", title), *children)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: Iterable[int] = ()
) -> Markup:
    """numbers: places of the columns that are set to the right."""
    right = set(numbers)

    def cells(name: str, values: Sequence[Any]) -> Iterable[Markup]:
        for place, value in enumerate(values):
            yield tag(name, value, class_="n") if place in right else tag(name, value)

    head = tag("tr", *cells("th", columns))
    body = [tag("tr", *cells("td", row)) for row in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="wide")


def listing(lines: Iterable[Any]) -> Markup:
    return tag("ul", *[tag("li", line) for line in lines])


def code(words: str) -> Markup:
    return tag("pre", tag("code", words))


def picture(content: bytes, words: str) -> Markup:
    """content: of a PNG file. words: what one sees on it."""
    source = "data:image/png;base64," + base64.b64encode(content).decode()
    return tag("figure", tag("img", src=source, alt=words))


def bar(share: float) -> Markup:
    """A share as a bar, from 0 to 1."""
    filled = tag("span", class_="bar", style=f"width:{100 * min(max(share, 0), 1):.1f}%")
    return tag("span", filled, class_="track")


def histogram(edges: Sequence[float], heights: Sequence[float], words: str) -> Markup:
    """Bars between edges, drawn to the scale of the edges; one bar where they are all equal."""
    span = edges[-1] - edges[0]
    most = max(heights, default=0) or 1
    bars = []
    for low, high, height in zip(edges[:-1], edges[1:], heights, strict=True):
        x = (low - edges[0]) / span * WIDTH if span > 0 else 0
        width = (high - low) / span * WIDTH if span > 0 else WIDTH
        tall = height / most * HEIGHT
        bars.append(
            tag(
                "rect",
                x=f"{x:.1f}",
                y=f"{HEIGHT - tall:.1f}",
                width=f"{max(width - 0.5, 0.5):.1f}",
                height=f"{tall:.1f}",
            )
        )
    box = f"0 0 {WIDTH} {HEIGHT}"
    return tag("svg", *bars, viewBox=box, role="img", aria_label=words)


def page(title: str, *children: Any) -> str:
    """A whole document."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', *children), lang='en')}\n"
