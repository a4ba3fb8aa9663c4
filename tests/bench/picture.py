"""Bars as an SVG that needs nothing: no script, no font, readable on light and dark."""

from __future__ import annotations

from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT = 760, 250, 120  # pixels: the picture, the names, the figures
ROW, GAP, HEAD = 24, 26, 34
STYLE = """\
.paper { fill: #ffffff } text { fill: #1f2328; font: 13px sans-serif } .head { font-weight: bold }
.ours { fill: #0969da } .less { fill: #9a6700 } .line { stroke: #59636e } .spread { stroke: #1f2328; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
.paper { fill: #0d1117 } text { fill: #f0f6fc } .ours { fill: #4493f8 } .less { fill: #d29922 }
.line { stroke: #9198a1 } .spread { stroke: #f0f6fc } }"""


class Bar(NamedTuple):
    name: str
    value: float
    low: float
    high: float


class Panel(NamedTuple):
    heading: str
    bars: list[Bar]


def draw(title: str, panels: list[Panel]) -> str:
    """Return the picture; in each panel a line marks 1, where copepod itself is."""
    lines: list[str] = []
    y = 12
    for panel in panels:
        lines.append(f'<text class="head" x="12" y="{y + 18}">{escape(panel.heading)}</text>')
        y += HEAD
        scale = (WIDTH - LEFT - RIGHT) / max(1.0, *(bar.high for bar in panel.bars))
        lines += [line for n, bar in enumerate(panel.bars) for line in draw_bar(bar, y + n * ROW, scale)]
        bottom = y + len(panel.bars) * ROW
        one = LEFT + scale
        lines.append(f'<text x="{one:.1f}" y="{bottom + 14}" text-anchor="middle">1</text>')
        lines.append(
            f'<line class="line" x1="{one:.1f}" y1="{y - 4}" x2="{one:.1f}" y2="{bottom}" stroke-dasharray="3 3"/>'
        )
        y = bottom + GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img" '
        'aria-labelledby="title desc">'
    )
    described = "; ".join(f"{p.heading}: " + ", ".join(f"{b.name} {figure(b.value)}" for b in p.bars) for p in panels)
    top = [
        head,
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="desc">{escape(described)}. The dashed line is 1.</desc>',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{y}" rx="6"/>',
    ]
    return "\n".join([*top, *lines, "</svg>\n"])


def draw_bar(bar: Bar, y: float, scale: float) -> list[str]:
    kind = "ours" if bar.value >= 1 else "less"
    low, high = LEFT + bar.low * scale, LEFT + bar.high * scale
    middle = y + ROW / 2 - 2
    return [
        f'<text x="{LEFT - 10}" y="{y + 15}" text-anchor="end">{escape(bar.name)}</text>',
        f'<rect class="{kind}" x="{LEFT}" y="{y + 2}" width="{bar.value * scale:.1f}" height="{ROW - 8}" rx="2"/>',
        f'<line class="spread" x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}"/>',
        f'<text x="{max(high, LEFT + bar.value * scale) + 8:.1f}" y="{y + 15}">{figure(bar.value)}</text>',
    ]


def figure(value: float) -> str:
    return f"{value:.0f} times" if value >= 10 else f"{value:.2g} times" if value >= 1 else f"{value:.2f}"
