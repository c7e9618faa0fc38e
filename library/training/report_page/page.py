"""A report as one HTML file that opens without a server, a network or other files.

Data are embedded as JSON; `common.js` and the page's script draw them with uPlot. A content security policy allows
these scripts only, and nothing is fetched, whatever captions, prompts and file names contain.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from html import escape, unescape
from pathlib import Path
from typing import Any

from library.base.json_text import parse_json
from library.checkpoints.marks import is_sealed_page, seal_page
from library.checkpoints.overwriting import FileKind, read_start

HERE = Path(__file__).parent
UPLOT = ("uplot/uPlot.iife.min.js", "uplot/uPlot.min.css")
SHARED = {"comparison.js": ("runs.js",), "sweep.js": ("runs.js",)}  # scripts to load before others
POLICY_START = "default-src 'none'; img-src data:"
TITLE = re.compile(rb"<title>([^<]*)(</title>)?")
TITLES = {"index": "Runs in ", "sweep": "Sweep of ", "comparison": "Comparison of "}  # their starts, by page
ENDING = "-report.html"  # of a run's file name
START, END = '<script type="application/json" id="data">', "</script>"


def page_kind(name: str, is_title: Callable[[str], bool]) -> FileKind:
    """Return the kind of the pages that `build_page` writes with such a title, and that nobody has changed since."""

    def recognises(start: bytes) -> bool:
        match = TITLE.search(start)
        is_ours = escape(POLICY_START).encode() in start and match is not None
        return is_ours and match is not None and is_title(unescape(match[1].decode("utf-8", "replace")))

    return FileKind(f"{name}, unchanged", lambda path: recognises(read_start(path)) and is_sealed_page(path))


def report_kind(output_name: str | None) -> FileKind:
    name = output_name or "last"
    return page_kind(f"a report of a run named {name}", lambda title: title == name)


def same_title(name: str, page: str) -> FileKind:
    """Return the kind of the pages with the title of `page`."""
    match = TITLE.search(page.encode())
    return page_kind(name, lambda title: match is not None and title == unescape(match[1].decode()))


REPORT = page_kind("a report", lambda title: True)
INDEX = page_kind("a report index", lambda title: title.startswith(TITLES["index"]))
SWEEP = page_kind("a report of a sweep", lambda title: title.startswith(TITLES["sweep"]))
COMPARISON = page_kind("a comparison of runs", lambda title: title.startswith(TITLES["comparison"]))


def build_page(title: str, script: str, data: Mapping[str, Any], reload_s: int | None = None) -> str:
    """Build the page that `script`, a file in this folder, draws from `data`; it reloads every `reload_s` seconds."""
    chart_script, chart_style = map(read_source, UPLOT)
    scripts = [chart_script, *map(read_source, ("common.js", *SHARED.get(script, ()), script))]
    page = read_source("page.html").format(
        refresh="" if reload_s is None else f'<meta http-equiv="refresh" content="{reload_s}">\n',
        title=escape(title),
        policy=escape(build_content_policy(scripts)),
        licence=escape(read_source("uplot/LICENSE")),
        style=f"{chart_style}\n{read_source('page.css')}",
        data=START + to_script(data) + END,
        scripts="\n".join(f"<script>{text}</script>" for text in scripts),
    )
    return seal_page(page)


@cache
def read_source(name: str) -> str:
    """Return the text of a file in this folder."""
    return (HERE / name).read_text(encoding="utf-8")


def build_content_policy(scripts: list[str]) -> str:
    """Return the content security policy: these scripts and embedded images only."""
    hashes = (hashlib.sha256(text.encode()).digest() for text in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)
    return f"{POLICY_START}; style-src 'unsafe-inline'; script-src {allowed}"


def to_script(data: Mapping[str, Any]) -> str:
    """Encode as JSON that cannot end a script element or begin a comment: ASCII without `<`."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def read_data(page: str) -> dict[str, Any]:
    """Return the data that `build_page` was given. Raises ValueError if there are none."""
    # to_script leaves no < in the data, so the first END behind START is theirs.
    start = page.find(START)
    end = page.find(END, start)
    if start < 0 or end < 0:
        raise ValueError("it holds no data of a report")
    data = parse_json(page[start + len(START) : end], allow_nan=False)
    if not isinstance(data, dict):
        raise ValueError("its data are no table")
    return data
