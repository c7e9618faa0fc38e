"""A report as one HTML file, which opens without a server, a network or anything beside it.

The data stand in it as JSON; `common.js` and a script of the page draw them with uPlot. A content security policy lets
these scripts run and nothing else, and nothing is fetched, whatever captions, prompts and names of files contain.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from library.checkpoints.overwriting import FileType
from library.json_text import parse_json

HERE = Path(__file__).parent
UPLOT = ("uplot/uPlot.iife.min.js", "uplot/uPlot.min.css")
SHARED = {"comparison.js": ("runs.js",), "sweep.js": ("runs.js",)}  # scripts that others need before them
POLICY_START = "default-src 'none'; img-src data:"
REPORT = FileType("a report", lambda start: escape(POLICY_START).encode() in start)
ENDING = "-report.html"  # of the file of a run
START, END = '<script type="application/json" id="data">', "</script>"


def build_page(title: str, script: str, data: Mapping[str, Any], reload_s: int | None = None) -> str:
    """Return the page that `script`, a file beside this one, draws of `data`; it reloads itself every `reload_s`."""
    chart_script, chart_style = map(read_source, UPLOT)
    scripts = [chart_script, *map(read_source, ("common.js", *SHARED.get(script, ()), script))]
    return read_source("page.html").format(
        refresh="" if reload_s is None else f'<meta http-equiv="refresh" content="{reload_s}">\n',
        title=escape(title),
        policy=escape(build_content_policy(scripts)),
        licence=escape(read_source("uplot/LICENSE")),
        style=f"{chart_style}\n{read_source('page.css')}",
        data=START + as_script(data) + END,
        scripts="\n".join(f"<script>{text}</script>" for text in scripts),
    )


@cache
def read_source(name: str) -> str:
    """Return the text of a file beside this one."""
    return (HERE / name).read_text(encoding="utf-8")


def build_content_policy(scripts: list[str]) -> str:
    """Return what the page may do: run these scripts, show images that it holds itself."""
    hashes = (hashlib.sha256(text.encode()).digest() for text in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)
    return f"{POLICY_START}; style-src 'unsafe-inline'; script-src {allowed}"


def as_script(data: Mapping[str, Any]) -> str:
    """JSON that ends no script element and begins no comment: it is ASCII and holds no `<`."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def read_data(page: str) -> dict[str, Any]:
    """Read back what `build_page` was given. Raises ValueError where that is not to be found."""
    start = page.find(START)
    end = page.find(END, start)
    if start < 0 or end < 0:
        raise ValueError("it holds no data of a report")
    data = parse_json(page[start + len(START) : end], allow_nan=False)
    if not isinstance(data, dict):
        raise ValueError("its data are no table")
    return data
