"""A headless Chromium that is driven by clicks and keys over its debugging pipe."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tests.browser import CHROMIUM, WATCH, command, with_scripts

DEADLINE_MS = 600_000  # of a condition, for a test that fails; a page that works never waits for it
# Conditions are looked at after every change of the page, not by the clock.
WHEN = """new Promise((resolve, reject) => {
  const look = () => {
    const found = (() => { %s })();
    if (!found) return;
    observer.disconnect();
    clearTimeout(timer);
    resolve(found);
  };
  const observer = new MutationObserver(look);
  const stop = () => { observer.disconnect(); reject(new Error("never: " + %s + "\\n" + document.body.innerText)); };
  const timer = setTimeout(stop, %d);
  observer.observe(document, {subtree: true, childList: true, attributes: true, characterData: true});
  look();
})"""
FIND = """
const shown = (one) => one.getClientRects().length && one.ariaDisabled !== "true";
const name = (one) => one.getAttribute("aria-label") ?? (one.labels?.[0]?.textContent || one.textContent).trim();
const controls = document.querySelectorAll("button, a, input, textarea, select, summary");
const all = [...controls].filter((one) => shown(one) && name(one) === %s);
"""
LOADED = """new Promise((resolve) => {
  if (document.readyState === "complete") setTimeout(resolve, 0);
  else addEventListener("load", () => setTimeout(resolve, 0));
})"""

# The browser has its pipes as 3 and 4.
START = """
import fcntl, os, sys
for target, source in enumerate([fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]], 3):
    os.dup2(source, target)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Navigated(Exception):
    """The page that a script ran in was replaced by another one."""


class Browser:
    """A browser without any page."""

    def __init__(self, requests: IO[bytes], answers: IO[bytes]) -> None:
        self._requests, self._answers, self._number = requests, answers, 0
        self.told: list[str] = []  # errors and warnings of all pages

    def call(self, method: str, session: str | None = None, **values: Any) -> Any:
        """Call a method of the DevTools protocol and return its result."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": values, **({"sessionId": session} if session else {})}
        self._requests.write(json.dumps(message).encode() + b"\0")
        self._requests.flush()
        while True:
            answer = self._read()
            if answer.get("id") == number:
                if "error" in answer and "navigated" in answer["error"]["message"]:
                    raise Navigated
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        answer: dict[str, Any] = json.loads(text)
        if answer.get("method") == "Runtime.exceptionThrown":
            self.told.append(str(answer["params"]["exceptionDetails"]))
        elif answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["level"] in ("error", "warning"):
            self.told.append(answer["params"]["entry"]["text"])
        return answer

    def open(self, address: str, width: int = 1400, height: int = 900, dark: bool = False) -> "Tab":
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "DOM"):
            tab.call(f"{domain}.enable")
        tab.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.call("Emulation.setEmulatedMedia", features=[scheme])
        tab.call("Emulation.setFocusEmulationEnabled", enabled=True)
        tab.call("Page.navigate", url=address)
        return tab


class Tab:
    """A page, which a user's clicks and keys reach."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def call(self, method: str, **values: Any) -> Any:
        return self.browser.call(method, self.session, **values)

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def run(self, script: str) -> Any:
        """Return the value of an expression, or of its promise."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def when(self, body: str) -> Any:
        """Return what the body of a function returns as soon as that is true, on this page or one that it leads to."""
        while True:
            with suppress(Navigated):
                return self.run(WHEN % (body, json.dumps(body), DEADLINE_MS))

    def see(self, text: str) -> None:
        """Wait until the page shows a text."""
        self.when(f"return document.body?.innerText.includes({json.dumps(text)})")

    def _place_of(self, name: str) -> Mapping[str, float]:
        place: Mapping[str, float] = self.when(
            FIND
            % json.dumps(name)
            + "const one = all[0]; if (!one) return null; one.scrollIntoView({block: 'center', behavior: 'instant'});"
            "window.hasClicked = false;"
            "one.addEventListener('click', () => { window.hasClicked = true; }, {once: true});"
            "const box = one.getBoundingClientRect(); return {x: box.x + box.width / 2, y: box.y + box.height / 2};"
        )
        return place

    def click(self, name: str) -> None:
        """Click what a screen reader calls by this name, once it is there; again if it moved away meanwhile."""
        while True:
            place = self._place_of(name)
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)
            if self.run("window.hasClicked"):
                return

    def write(self, name: str, text: str) -> None:
        """Write into the field of this name in place of its content, and leave it."""
        self.click(name)
        self.run("document.activeElement.select()")
        self.call("Input.insertText", text=text)
        self.run("document.activeElement.blur()")

    def choose(self, name: str, value: str) -> None:
        """Choose an entry of a list by its value."""
        script = FIND % json.dumps(name) + f"all[0].value = {json.dumps(value)};"
        self.run(f"(() => {{ {script} all[0].dispatchEvent(new Event('change', {{bubbles: true}})); }})()")

    def press(self, key: str) -> None:
        code = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}[key]
        text = {"Enter": "\r", " ": " "}.get(key)
        typed = {"key": key, "windowsVirtualKeyCode": code, **({"text": text} if text else {})}
        self.call("Input.dispatchKeyEvent", type="keyDown", **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def drop(self, selector: str, files: Sequence[Path]) -> None:
        """Drop files on an element."""
        place = self.when(
            f"const box = document.querySelector({json.dumps(selector)})?.getBoundingClientRect();"
            "return box && {x: box.x + box.width / 2, y: box.y + box.height / 2};"
        )
        data = {"items": [], "files": [str(path) for path in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, data=data, **place)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=False)["data"]))


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """Run a browser, whose profile goes into `folder`."""
    assert CHROMIUM is not None
    theirs_in, requests = os.pipe()
    answers, theirs_out = os.pipe()
    words = command("about:blank", folder, "--remote-debugging-pipe")
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(theirs_in), str(theirs_out), *words],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        with os.fdopen(requests, "wb") as to, os.fdopen(answers, "rb") as back:
            yield Browser(to, back)
    finally:
        process.terminate()
        process.wait(timeout=60)


def ask(page: str, script: str, folder: Path) -> tuple[Any, list[str]]:
    """Return (result of `script`, the body of an async function that runs in the loaded page; errors and warnings of
    the page)."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / "asked.html"
    copy.write_text(with_scripts(page, WATCH), encoding="utf-8")
    with browsing(folder) as browser:
        tab = browser.open(copy.resolve().as_uri(), width=1250, height=1400)
        tab.run(LOADED)
        found = tab.run(f"(async () => {{ {script} }})().catch((error) => ({{failed: String(error)}}))")
        return found, tab.run("window.told")
