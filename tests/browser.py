"""The command that starts headless Chromium, and scripts that are inserted into a copy of a page."""

import base64
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
