"""A sequence diagram as one SVG file: no scripts, nothing from elsewhere, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape

from .diagram import BRIDGE, Diagram, Lane, Row

# In pixels; text is monospaced, CHAR wide.
MARGIN, TIMES, STEP, ROW, HEAD, CHAR = 16, 96, 400, 30, 60, 6.63
SMALL = 6.1
# The parties are named again after so many rows.
AGAIN = 40

_STYLE = """
text{font:11px ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;fill:#1f2328}
.bg{fill:#fff}.title{font-size:14px;font-weight:bold}
.time,.took,.text,.fact,.which,.silence{fill:#656d76}
.lane{stroke:#d0d7de;stroke-width:1}.party{fill:#f6f8fa;stroke:#d0d7de}
.who{font-weight:bold;text-anchor:middle}.which{text-anchor:middle;font-size:10px}
.name{font-weight:bold}.at{text-anchor:end}.center{text-anchor:middle}
.arrow{stroke:#0969da;stroke-width:1.4;fill:none}.tip{fill:#0969da}
.ioctl .arrow{stroke:#1a7f37}.ioctl .tip{fill:#1a7f37}
.reply .arrow{stroke:#8c959f;stroke-dasharray:4 3}.reply .tip{fill:#8c959f}
.reply .name{font-weight:normal}
.note{fill:#fff8c5;stroke:#d4a72c}.warning .note{fill:#ffe2b8}.failed .note{fill:#ffcecb}
.failed .arrow{stroke:#cf222e}.failed .tip{fill:#cf222e}.failed .name,.failed .text{fill:#cf222e}
@media (prefers-color-scheme:dark){
text{fill:#e6edf3}.bg{fill:#0d1117}.time,.took,.text,.fact,.which,.silence{fill:#8d96a0}
.lane{stroke:#30363d}.party{fill:#161b22;stroke:#30363d}
.arrow{stroke:#4493f8}.tip{fill:#4493f8}.ioctl .arrow{stroke:#3fb950}.ioctl .tip{fill:#3fb950}
.note{fill:#2e2a1f;stroke:#9e6a03}.warning .note{fill:#4a3310}.failed .note{fill:#4b1113}
.failed .arrow{stroke:#f85149}.failed .tip{fill:#f85149}
.failed .name,.failed .text{fill:#ff7b72}}
"""


def svg_text(diagram: Diagram) -> str:
    """The picture, as the text of a file."""
    return "\n".join(_Picture(diagram).lines()) + "\n"


class _Picture:
    def __init__(self, diagram: Diagram) -> None:
        self._diagram = diagram
        self._x = [MARGIN + TIMES + 70 + STEP * n for n in range(len(diagram.lanes))]
        self._width = self._x[-1] + max(90, self._box(diagram.lanes[-1]) // 2) + MARGIN
        self._top = MARGIN + 24 + 16 * len(diagram.facts)

    def lines(self) -> Iterator[str]:
        body = list(self._body())
        yield (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self._width}" height="{self._end}" '
            f'viewBox="0 0 {self._width} {self._end}" role="img">'
        )
        yield f"<title>{escape(self._diagram.facts[0])}</title><style>{_STYLE}</style>"
        yield f'<rect class="bg" width="{self._width}" height="{self._end}"/>'
        yield from self._facts()
        for x in self._x:
            yield f'<line class="lane" x1="{x}" y1="{self._top}" x2="{x}" y2="{self._end}"/>'
        yield from body
        yield "</svg>"

    @staticmethod
    def _box(lane: Lane) -> int:
        return max(96, min(STEP - 20, round(len(lane.detail) * SMALL) + 20))

    def _facts(self) -> Iterator[str]:
        yield f'<text class="title" x="{MARGIN}" y="{MARGIN + 8}">vhost-bridge trace</text>'
        for number, fact in enumerate(self._diagram.facts):
            y = MARGIN + 26 + 16 * number
            yield f'<text class="fact" x="{MARGIN}" y="{y}">{escape(fact)}</text>'

    def _body(self) -> Iterator[str]:
        y = self._top
        for number, row in enumerate(self._diagram.rows):
            if number % AGAIN == 0:
                yield from self._parties(y)
                y += HEAD
            yield from self._row(row, y + ROW)
            y += ROW
        self._end = y + MARGIN

    def _parties(self, y: int) -> Iterator[str]:
        for x, lane in zip(self._x, self._diagram.lanes, strict=True):
            width = self._box(lane)
            yield (
                f'<rect class="party" x="{x - width // 2}" y="{y + 14}" width="{width}" '
                f'height="{HEAD - 22}" rx="5"/>'
            )
            middle = y + 30 if lane.detail else y + 37
            yield f'<text class="who" x="{x}" y="{middle}">{escape(lane.name)}</text>'
            detail = cut(lane.detail, (STEP - 40) / SMALL)
            yield f'<text class="which" x="{x}" y="{y + 44}">{escape(detail)}</text>'

    def _row(self, row: Row, y: int) -> Iterator[str]:
        kinds = " ".join(row.kinds)
        tip = "\n".join(f"{key}: {value}" for key, value in row.details)
        yield f'<g class="{kinds}"><title>{escape(tip or row.name)}</title>'
        yield f'<text class="time at" x="{MARGIN + TIMES}" y="{y}">{row.time}</text>'
        if row.kind == "silence":
            x = self._x[BRIDGE]
            yield f'<rect class="bg" x="{x - 60}" y="{y - 16}" width="120" height="20"/>'
            yield f'<text class="silence center" x="{x}" y="{y - 2}">⋮ {escape(row.name)}</text>'
        elif row.source == row.target:
            yield from self._note(row, y)
        else:
            yield from self._arrow(row, y)
        yield "</g>"

    def _note(self, row: Row, y: int) -> Iterator[str]:
        name = f"{row.name}  " if row.name else ""
        text = cut(row.text, 100 - len(name))
        width = round((len(name) + len(text)) * CHAR) + 18
        x = max(MARGIN + TIMES + 8, self._x[BRIDGE] - width // 2)
        yield (
            f'<rect class="note" x="{x}" y="{y - 15}" width="{width}" height="21" rx="4"/>'
            f'<text x="{x + 8}" y="{y}" xml:space="preserve"><tspan class="name">'
            f"{escape(name)}</tspan>{escape(text)}</text>"
        )

    def _arrow(self, row: Row, y: int) -> Iterator[str]:
        start, end = self._x[row.source], self._x[row.target]
        left, right = min(start, end), max(start, end)
        step = 6 if end > start else -6
        line = y + 4
        yield f'<line class="arrow" x1="{start}" y1="{line}" x2="{end - step}" y2="{line}"/>'
        points = f"{end},{line} {end - step * 1.4:g},{line - 4} {end - step * 1.4:g},{line + 4}"
        yield f'<polygon class="tip" points="{points}"/>'
        room = (right - left) / CHAR - len(row.name) - len(row.took) - 7
        text = cut(row.text, room)
        yield (
            f'<text x="{left + 10}" y="{y - 1}" xml:space="preserve"><tspan class="name">'
            f'{escape(row.name)}</tspan><tspan class="text">  {escape(text)}</tspan></text>'
        )
        yield f'<text class="took at" x="{right - 10}" y="{y - 1}">{escape(row.took)}</text>'


def cut(text: str, length: float) -> str:
    """At most so many characters of a text."""
    return text if len(text) <= length else f"{text[: max(0, int(length) - 1)]}…"
