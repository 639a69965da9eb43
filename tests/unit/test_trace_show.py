"""``trace show``: text, JSON and pictures of traces, also of those that mean harm."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.unit.commands import Run
from vhostbridge.bridge.trace.entry import Entry, parse
from vhostbridge.bridge.trace.text import TextTrace
from vhostbridge.bridge.trace.words import clean, moment, span

WALL = 1_795_580_128_000_000_000
VDPA = "/dev/vhost-vdpa-0"
USER = "back-end vhost-user:/run/b.sock"
SVG = "{http://www.w3.org/2000/svg}"

# Microseconds from the first record, and what is in it.
SAMPLE: list[tuple[int, dict[str, object]]] = [
    (0, {"kind": "start", "name": "start", "fields": {"version": "1", "kernel": "6.12", "pid": 7}}),
    (10, {"kind": "event", "name": "info", "fields": {"text": "front-end connected (pid 9)"}}),
    (
        100,
        {"kind": "message", "from": "front-end", "to": "bridge", "name": "GET_FEATURES"},
    ),
    (
        157,
        {
            "kind": "message",
            "from": "bridge",
            "to": "front-end",
            "name": "GET_FEATURES",
            "reply": True,
            "fields": {"features": "0x100000200", "names": ["FLUSH", "VERSION_1"]},
        },
    ),
    (
        200,
        {
            "kind": "message",
            "from": "front-end",
            "to": "bridge",
            "name": "SET_VRING_KICK",
            "need_reply": True,
            "fds": 1,
            "fields": {"index": 0, "fd": True},
        },
    ),
    (
        300,
        {
            "kind": "ioctl",
            "from": "bridge",
            "to": VDPA,
            "name": "VHOST_SET_FEATURES",
            "result": -1,
            "errno": "EINVAL",
            "duration": 12_345,
            "fields": {"features": "0x200", "names": ["FLUSH"]},
        },
    ),
    (
        400,
        {
            "kind": "message",
            "from": "bridge",
            "to": "front-end",
            "name": "SET_VRING_KICK",
            "reply": True,
            "fields": {"ack": "refused (1)"},
        },
    ),
    (
        500,
        {
            "kind": "message",
            "from": "bridge",
            "to": USER,
            "name": "SET_VRING_ENABLE",
            "repeat": 64,
            "fields": {"index": 0, "enabled": 1},
        },
    ),
    (
        2_000_500,
        {
            "kind": "message",
            "from": USER,
            "to": "bridge",
            "name": "CONFIG_CHANGE_MSG",
            "reverse": True,
        },
    ),
    (
        2_000_600,
        {
            "kind": "event",
            "name": "state",
            "fields": {"before": "running", "now": "failed", "device": "vdpa:b"},
        },
    ),
    (2_000_700, {"kind": "event", "name": "error", "fields": {"text": "it failed"}}),
]

GOLDEN = """\
--- vhost-bridge 1, pid 7, Linux 6.12; the trace began 2026-11-25 04:15:28.000000 UTC
     seconds  bridge     front-end    back-end
    0.000010  vm1               ●        info                         front-end connected (pid 9)
    0.000100  vm1        ──────▶│        GET_FEATURES
    0.000157  vm1        ◀┄┄┄┄┄┄│        GET_FEATURES                 features=0x100000200 \
{FLUSH VERSION_1}  (57 µs)
    0.000200  vm1        ──────▶│        SET_VRING_KICK               index=0 fd=yes  +1 fd  \
need_reply
                                /dev/vhost-vdpa-0
    0.000300  vm1               │──────▶ VHOST_SET_FEATURES           features=0x200 {FLUSH}  \
= -1 EINVAL  (12.3 µs)
    0.000400  vm1        ◀┄┄┄┄┄┄│        SET_VRING_KICK ack           refused (1)  (200 µs)
                                back-end vhost-user:/run/b.sock
    0.000500  vm1               │──────▶ SET_VRING_ENABLE             index=0 enabled=1  ×64
    2.000500  vm1               │◀────── CONFIG_CHANGE_MSG (reverse)
    2.000600  vm1               ●        state                        running → failed  (vdpa:b)
    2.000700  vm1               ●        error                        it failed
"""


def lines(sample: list[tuple[int, dict[str, object]]], bridge: str = "vm1") -> bytes:
    out = []
    for at, record in sample:
        times: dict[str, object] = {"mono": 10**9 + at * 1000, "wall": WALL + at * 1000}
        if record["kind"] == "start":
            out.append({"vhost-bridge-trace": 1, **times, **record})
        else:
            out.append({**times, "bridge": bridge, **record})
    return b"".join(json.dumps(one, separators=(",", ":")).encode() + b"\n" for one in out)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "t.trace"
    path.write_bytes(lines(SAMPLE))
    return path


def test_text_of_every_kind_of_record(run: Run, trace: Path) -> None:
    assert run("trace", "show", trace) == (0, GOLDEN, "")


def test_json_is_the_records_themselves(run: Run, trace: Path) -> None:
    shown = run("trace", "show", "-j", trace)
    assert (shown.code, shown.out.encode()) == (0, trace.read_bytes())


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--only", "ioctl"], 1),
        (["--only", "ioctl", "--only", "event"], 4),
        (["--since", "0.0003"], 6),
        (["--since", "2"], 3),
        (["--since", "04:15:30"], 3),
        (["--since", "2026-11-25T04:15:30"], 3),
        (["--since", "2026-11-25T05:15:30+01:00"], 3),
        (["--since", "05:00:00"], 0),
        (["--bridge", "vm1"], 10),
    ],
)
def test_records_are_selected(run: Run, trace: Path, options: list[str], count: int) -> None:
    shown = run("trace", "show", "-j", trace, *options)
    assert shown.code == 0
    assert len(shown.out.splitlines()) == count + 1


def test_bridge_that_is_not_there_is_told_with_those_that_are(run: Run, trace: Path) -> None:
    shown = run("trace", "show", "-j", trace, "--bridge", "vm2")
    assert len(shown.out.splitlines()) == 1
    assert shown.err == (
        "vhost-bridge: no record of a bridge called vm2 was found\n  hint: the trace has: vm1\n"
    )


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--since", "yesterday"], 2, "'yesterday' is no time"),
        (["--since", "99:99:99"], 2, "'99:99:99' is no time"),
        (["-j", "--svg", "x"], 2, "--json excludes --svg and --html"),
        (["--follow", "--html", "x"], 2, "--follow is for the text of one file"),
        (["--svg", "/nowhere/x"], 1, "cannot write /nowhere/x: No such file or directory"),
        (["--since", "99", "--only", "ioctl", "--svg", "x"], 1, "nothing to draw"),
    ],
)
def test_mistakes_are_told_in_one_line(
    run: Run, trace: Path, options: list[str], code: int, said: str
) -> None:
    shown = run("trace", "show", trace, *options)
    assert shown.code == code
    assert shown.err.splitlines()[0].startswith(f"vhost-bridge: {said}")


def test_damage_is_told_after_what_is_right(run: Run, trace: Path) -> None:
    trace.write_bytes(lines(SAMPLE[:3]) + b"\0\0\n" + lines(SAMPLE[3:4]))
    shown = run("trace", "show", trace)
    assert shown.code == 1
    assert shown.out == "".join(line + "\n" for line in GOLDEN.splitlines()[:4])
    assert shown.err == f"vhost-bridge: {trace} is damaged in line 4: it is no JSON\n"


def test_two_files_are_one_trace(run: Run, tmp_path: Path) -> None:
    for name, part in (("t.1", SAMPLE[:4]), ("t", [SAMPLE[0], *SAMPLE[4:]])):
        (tmp_path / name).write_bytes(lines(part))
    shown = run("trace", "show", tmp_path / "t.1", tmp_path / "t")
    assert [line for line in shown.out.splitlines() if not line.startswith("---")] == [
        line for line in GOLDEN.splitlines() if not line.startswith("---")
    ]


def test_standard_input_a_closed_pipe_and_a_full_disk(trace: Path) -> None:
    command = f"{sys.executable} -m vhostbridge trace show"
    script = f"{command} - < {trace} | head -3; {command} {trace} > /dev/full; echo $?"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[:3] == GOLDEN.splitlines()[:3]
    assert done.stdout.splitlines()[3:] == ["1"]
    assert done.stderr == ("vhost-bridge: cannot write standard output: No space left on device\n")


def test_colours_are_for_terminals() -> None:
    text = TextTrace(lambda text, style: f"<{style}>{text.strip()}</>")
    shown = [text.line(parse(line)) for line in lines(SAMPLE).splitlines()]
    for number, style in ((2, "message"), (3, "reply"), (5, "failed"), (6, "failed"), (9, "event")):
        assert f"<{style}>" in shown[number], shown[number]


# Pictures


def drawn(run: Run, path: Path, *options: str) -> tuple[ET.Element, str]:
    svg, html = path.with_suffix(".svg"), path.with_suffix(".html")
    shown = run("trace", "show", path, "--svg", svg, "--html", html, *options)
    assert (shown.code, shown.out, shown.err) == (0, "", "")
    return ET.fromstring(svg.read_text()), html.read_text()


def test_svg_has_a_lane_for_each_party_and_an_arrow_for_each_message(run: Run, trace: Path) -> None:
    svg, _ = drawn(run, trace)
    text = ["".join(e.itertext()) for e in svg.iter(f"{SVG}text")]
    for lane in ("front-end", "bridge", "kernel", VDPA, "back-end", "vhost-user:/run/b.sock"):
        assert lane in text
    groups = dict.fromkeys(("message", "message reply", "message reply failed"), 0)
    for group in svg.iter(f"{SVG}g"):
        kind = group.get("class", "")
        groups[kind] = groups.get(kind, 0) + 1
    assert groups == {
        "message": 4,
        "message reply": 1,
        "message reply failed": 1,
        "ioctl failed": 1,
        "event": 2,
        "event failed": 1,
        "start": 1,
        "silence": 1,
    }
    tips = ["".join(e.itertext()) for g in svg.iter(f"{SVG}g") for e in g.iter(f"{SVG}title")]
    assert any("result: -1 (EINVAL)" in tip and "took: 12.3 µs" in tip for tip in tips)
    assert {e.tag.removeprefix(SVG) for e in svg.iter()} == {
        *("svg", "title", "style", "rect", "line", "polygon", "text", "tspan", "g")
    }


class Page(HTMLParser):
    """Counts what a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.attributes: set[str] = set()
        self.rows: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes |= {name for name, _ in attrs}
        if tag == "details" and "row" in str(dict(attrs).get("class")):
            self.rows.append(str(dict(attrs)["class"]))


def test_page_has_a_row_with_all_fields_for_each_record(run: Run, trace: Path) -> None:
    _, html = drawn(run, trace)
    page = Page(html)
    assert len(page.rows) == len(SAMPLE)
    assert "row ioctl failed" in page.rows
    assert "<td>errno</td>" not in html and "<td>-1 (EINVAL)</td>" in html
    assert page.tags.keys().isdisjoint({"script", "img", "link", "iframe", "object", "svg"})
    assert "src" not in page.attributes and "url(" not in html and "http:" not in html


NASTY = "<script>alert(1)</script>]]>&\"'--><b>\x1b[2J\x00\u202eevil\ud800\n"


def test_names_and_paths_of_peers_can_not_be_markup_or_move_the_cursor(
    run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "t"
    hurt: list[tuple[int, dict[str, object]]] = [
        SAMPLE[0],
        (1, {"kind": "message", "from": NASTY, "to": "bridge", "name": NASTY}),
        (2, {"kind": "ioctl", "from": "bridge", "to": NASTY, "name": NASTY, "errno": NASTY}),
        (3, {"kind": "event", "name": NASTY, "fields": {NASTY: [NASTY, {NASTY: NASTY}]}}),
        (4, {"kind": "event", "name": "info", "fields": {"text": NASTY}}),
    ]
    path.write_bytes(lines(hurt, bridge=NASTY))
    svg, html = drawn(run, path)
    assert not [e for e in svg.iter() if e.tag.removeprefix(SVG) in ("script", "b")]
    page = Page(html)
    assert "script" not in page.tags and len(page.rows) == len(hurt)
    plain = sum("<b>" in line for line in html.splitlines())
    assert page.tags["b"] <= plain
    shown = run("trace", "show", path)
    assert shown.code == 0 and len(shown.out.splitlines()) == len(hurt) + 2
    for text in (shown.out, html, path.with_suffix(".svg").read_text()):
        assert not set("\x1b\x00\u202e") & set(text)
    assert "&lt;script&gt;" in html


def test_pictures_are_of_one_bridge(run: Run, trace: Path) -> None:
    with trace.open("ab") as file:
        file.write(lines(SAMPLE[2:3], bridge="vm2"))
    shown = run("trace", "show", trace, "--svg", trace.with_suffix(".svg"))
    assert shown == (
        2,
        "",
        "vhost-bridge: a picture is of one bridge, the trace has vm1, vm2\n  hint: --bridge NAME\n",
    )
    svg, _ = drawn(run, trace, "--bridge", "vm1")
    assert sum(g.get("class", "").startswith("message") for g in svg.iter(f"{SVG}g")) == 6


def test_too_much_for_a_picture_is_told(run: Run, trace: Path) -> None:
    with trace.open("ab") as file:
        file.write(lines(SAMPLE[1:2] * 20_001))
    shown = run("trace", "show", trace, "--svg", trace.with_suffix(".svg"))
    assert (shown.code, shown.err.splitlines()[0]) == (
        1,
        "vhost-bridge: more than 20000 records make no picture",
    )


def test_times_for_people() -> None:
    assert [span(n) for n in (0, 999, 1000, 57_400, 1_234_567, 999_999_999, 5 * 10**12)] == [
        *("0 ns", "999 ns", "1 µs", "57.4 µs", "1.23 ms", "1 s", "5000 s")
    ]
    assert moment(WALL, 3) == "2026-11-25 04:15:28.000 UTC"
    assert moment(2**63 - 1) == "2262-04-11 23:47:16.854775 UTC"
    assert clean("a" * 5000) == "a" * 4096 + "…"
    assert not Entry(1, 1, "ioctl", "x", result=3).failed
