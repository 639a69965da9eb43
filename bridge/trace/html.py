"""A sequence diagram as one page: no scripts, nothing from elsewhere, every field a click away."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from .diagram import Diagram, Row

_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1f2328;--dim:#656d76;--line:#d0d7de;--box:#f6f8fa;
--msg:#0969da;--ioctl:#1a7f37;--reply:#8c959f;--note:#fff8c5;--edge:#d4a72c;--bad:#cf222e;
--badbg:#ffcecb;--warn:#ffe2b8}
@media (prefers-color-scheme:dark){:root{--bg:#0d1117;--fg:#e6edf3;--dim:#8d96a0;--line:#30363d;
--box:#161b22;--msg:#4493f8;--ioctl:#3fb950;--reply:#768390;--note:#2e2a1f;--edge:#9e6a03;
--bad:#ff7b72;--badbg:#4b1113;--warn:#4a3310}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:12px/1.45 ui-monospace,"DejaVu Sans Mono",
Menlo,Consolas,monospace}
main{max-width:1500px;margin:0 auto;padding:1rem}
h1{font-size:17px;margin:0 0 .4rem}p{margin:.15rem 0;color:var(--dim)}
.filters{margin:.7rem 0}.filters label{margin-right:1.2rem;cursor:pointer}
.slow{margin:.4rem 0 .8rem}.slow summary{cursor:pointer}.slow a{color:var(--msg)}
.grid{display:grid;grid-template-columns:6.5rem repeat(var(--lanes),1fr)}
.head{position:sticky;top:0;z-index:2;background:var(--bg);padding:.3rem 0;
border-bottom:1px solid var(--line)}
.party{justify-self:center;text-align:center;background:var(--box);border:1px solid var(--line);
border-radius:6px;padding:.15rem .8rem;font-weight:bold;max-width:96%;overflow-wrap:anywhere}
.party small{display:block;font-weight:normal;color:var(--dim)}
.body{position:relative;padding-bottom:1rem}
.lanes{position:absolute;inset:0;z-index:-1}
.lanes i{grid-column:var(--at);justify-self:center;border-left:1px solid var(--line)}
details.row{scroll-margin-top:4.5rem}
details.row>summary{list-style:none;cursor:pointer;align-items:end;min-height:1.9rem}
details.row>summary::-webkit-details-marker{display:none}
details.row>summary:hover,details.row:target>summary,details.row[open]>summary{background:
color-mix(in srgb,var(--msg) 9%,transparent)}
.time{grid-column:1;text-align:right;padding-right:.8rem;color:var(--dim)}
.say{grid-row:1;grid-column:var(--from)/var(--to);margin:0 calc(50%/var(--span));position:relative;
padding:.15rem .7rem .2rem;display:flex;gap:.9em;border-bottom:1.5px solid var(--tone);
white-space:nowrap;--tone:var(--msg)}
.say::after{content:"";position:absolute;bottom:-5px;border:4.5px solid transparent}
.right::after{right:0;border-left:8px solid var(--tone);border-right:0}
.left::after{left:0;border-right:8px solid var(--tone);border-left:0}
.say b{flex:none}.say span{overflow:hidden;text-overflow:ellipsis;color:var(--dim);flex:1}
.say em{font-style:normal;color:var(--dim)}
.ioctl .say{--tone:var(--ioctl)}.reply .say{--tone:var(--reply);border-bottom-style:dashed}
.reply .say b{font-weight:normal}
.failed .say{--tone:var(--bad)}.failed b,.failed .say span{color:var(--bad)}
.note{grid-row:1;grid-column:2/5;justify-self:center;background:var(--note);
border:1px solid var(--edge);border-radius:5px;padding:.05rem .7rem;margin:.2rem 0;max-width:100%;
overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.warning .note{background:var(--warn)}.failed .note{background:var(--badbg);border-color:var(--bad)}
.silence span{grid-column:2/5;justify-self:center;background:var(--bg);color:var(--dim);
margin:.2rem 0;padding:0 .8rem}
table{margin:.1rem 0 .6rem 7.5rem;border-collapse:collapse;background:var(--box);
border:1px solid var(--line)}
.slow table{margin:.2rem 0}
td{padding:.1rem .7rem;vertical-align:top;overflow-wrap:anywhere}
td:first-child{color:var(--dim);white-space:nowrap}
body:has(#message:not(:checked)) .row.message,body:has(#ioctl:not(:checked)) .row.ioctl,
body:has(#event:not(:checked)) .row.event{display:none}
@media print{.head{position:static}.filters{display:none}}
"""


def html_text(diagram: Diagram) -> str:
    """The page, as the text of a file."""
    return "\n".join(_page(diagram)) + "\n"


def _page(diagram: Diagram) -> Iterator[str]:
    lanes = diagram.lanes
    yield '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    yield (
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
    )
    yield '<meta name="viewport" content="width=device-width">'
    yield f"<title>{escape(diagram.facts[0])}</title>"
    yield f"<style>{_STYLE}:root{{--lanes:{len(lanes)}}}</style></head><body><main>"
    yield "<h1>vhost-bridge trace</h1>"
    yield from (f"<p>{escape(fact)}</p>" for fact in diagram.facts)
    yield from _controls(diagram)
    yield '<div class="head grid">'
    for number, lane in enumerate(lanes):
        detail = f"<small>{escape(lane.detail)}</small>" if lane.detail else ""
        yield (
            f'<div class="party" style="grid-column:{number + 2}">{escape(lane.name)}{detail}</div>'
        )
    yield '</div><div class="body"><div class="lanes grid">'
    yield "".join(f'<i style="--at:{number + 2}"></i>' for number in range(len(lanes)))
    yield "</div>"
    for row in diagram.rows:
        yield from _row(row)
    yield "</div></main></body></html>"


def _controls(diagram: Diagram) -> Iterator[str]:
    kinds = {row.kind for row in diagram.rows} & {"message", "ioctl", "event"}
    yield '<div class="filters">'
    for kind in sorted(kinds):
        yield f'<label><input type="checkbox" id="{kind}" checked> {kind}s</label>'
    yield "<em>a click on a line shows all of it</em></div>"
    if diagram.slowest:
        yield '<details class="slow"><summary>What took longest</summary><table>'
        for row in diagram.slowest:
            yield (
                f'<tr><td>{escape(row.took)}</td><td><a href="#r{row.number}">'
                f"{escape(row.name)}</a></td><td>at {row.time} s</td></tr>"
            )
        yield "</table></details>"


def _row(row: Row) -> Iterator[str]:
    if row.kind == "silence":
        yield f'<div class="silence grid"><span>⋮ {escape(row.name)}</span></div>'
        return
    yield (
        f'<details class="row {" ".join(row.kinds)}" id="r{row.number}"><summary class="grid">'
        f'<span class="time">{row.time}</span>{_line(row)}</summary>'
    )
    cells = (f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in row.details)
    yield f"<table>{''.join(cells)}</table></details>"


def _line(row: Row) -> str:
    text = f"<b>{escape(row.name)}</b>" if row.name else ""
    if row.source == row.target:
        return f'<div class="note">{text} <span>{escape(row.text)}</span></div>'
    first, last = sorted((row.source, row.target))
    towards = "right" if row.target > row.source else "left"
    place = f"--from:{first + 2};--to:{last + 3};--span:{last - first + 1}"
    return (
        f'<div class="say {towards}" style="{place}">{text}<span>{escape(row.text)}</span>'
        f"<em>{escape(row.took)}</em></div>"
    )
