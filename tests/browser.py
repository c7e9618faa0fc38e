"""Pages in headless Chromium, without a driver: a script inserted into a copy of the page inspects it from inside."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
# With CI set, a browser that is missing fails the tests instead of skipping them.
in_browser = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="no Chromium is installed; on Debian: apt install chromium"
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--window-size=1250,1400",
)  # fmt: skip
WATCH = """
window.told = [];
const tell = (text) => window.told.push(String(text));
for (const kind of ["error", "warn"]) console[kind] = (...words) => tell(words.join(" "));
addEventListener("error", (event) => tell(event.message), true);
addEventListener("unhandledrejection", (event) => tell(event.reason));
addEventListener("securitypolicyviolation", (event) => tell(`policy: ${event.violatedDirective} ${event.blockedURI}`));
"""
ASK = """
addEventListener("load", () => setTimeout(async () => {
  let found;
  try { found = await (async () => { %s })(); } catch (error) { found = {failed: String(error)}; }
  document.body.append(Object.assign(document.createElement("pre"), {id: "answer", textContent: JSON.stringify(
    {found, told: window.told})}));
}, 0));
"""
ANSWER = re.compile(r'<pre id="answer">(.*?)</pre>', re.DOTALL)


def with_scripts(page: str, *scripts: str) -> str:
    """Insert scripts before the page's own, and allow them in its content security policy."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    hashes = "".join(f"&#x27;sha256-{digest}&#x27; " for digest in digests)
    page, count = re.subn("script-src ", lambda _: f"script-src {hashes}", page, count=1)
    assert count == 1, "the page has no policy"
    tags = "".join(f"<script>{text}</script>" for text in scripts)
    return page.replace("</title>", f"</title>{tags}", 1)


def command(address: str, folder: Path, *words: str) -> list[str]:
    """Return the command that opens an address of this machine, the only one it reaches. `folder` gets a profile."""
    assert CHROMIUM is not None
    rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    return [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", rules, *words, address]


@contextmanager
def opened(address: str, folder: Path) -> Iterator[None]:
    """Keep a page open in Chromium, whose profile goes into `folder`."""
    browser = subprocess.Popen(command(address, folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        browser.terminate()
        browser.wait(timeout=60)


def run(page: Path, folder: Path, *words: str) -> bytes:
    """Return Chromium's output for a file."""
    done = subprocess.run(command(page.resolve().as_uri(), folder, *words), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def ask(page: str, script: str, folder: Path) -> tuple[Any, list[str]]:
    """Return (result of `script`, the body of an async function that runs in the page; errors and warnings of the
    page)."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / "asked.html"
    copy.write_text(with_scripts(page, WATCH, ASK % script), encoding="utf-8")
    dumped = run(copy, folder, "--virtual-time-budget=5000", "--dump-dom").decode("utf-8")
    answer = ANSWER.search(dumped)
    assert answer is not None, dumped[-2000:]
    answer_data = json.loads(unescape(answer[1]))
    return answer_data["found"], answer_data["told"]
