"""The page at the widths of phones, laptops and large screens, light and dark, for a keyboard and for axe-core."""

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from library.page.jobs import id_of
from library.page.server import PORT
from library.page.store import Choice, Draft, Store
from library.train_photos.record import Record
from library.training.report_page.page import ENDING
from library.training.report_page.writer import build_report, read_events
from library.training.run_queue.folder import write_whole
from library.training.run_queue.jobs import Job
from tests.browser import in_browser
from tests.chromium import Browser, Tab, browsing
from tests.event_lines import STARTED, lines_of, plan, start, step
from tests.page.serving import Server, serving
from tests.running import ROOT

pytestmark = [in_browser, pytest.mark.slow]

PHOTOS = ROOT / "configs" / "quickstart" / "dataset"
AXE = Path(__file__).parent / "axe" / "axe.min.js"  # MPL 2.0, from https://github.com/dequelabs/axe-core
FIT = {"bytes": 9.5 * 2**30, "gpu_bytes": 11.8 * 2**30}
SIZES = ((390, 844), (1400, 900), (2560, 1300))
RULES = "{runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa'], iframes: false}"
RELOADS = """<!doctype html><title>report</title><body><script>
const {type} = performance.getEntriesByType("navigation")[0];
document.body.textContent = `loaded by ${type}`;
if (type !== "reload") location.reload();
</script>"""
PUBLISHED = [
    {"repository": "me/one", "file": "one.safetensors", "gigabytes": 6.9, "licence": "MIT"},
    {"repository": "me/two", "file": "", "gigabytes": None, "licence": ""},
]
LINES = (
    ("base", "Stable Diffusion 1.x: /models/a_model_with_a_long_name_that_has_no_place_to_break.safetensors"),
    ("captions", '24 of 24 photos, "zheart" is in 24'),
    ("", 'trained as "zheart, a heart" (24 photos)'),
    ("takes", "about 35 min and 9.8 GiB of 11.2 GiB of the GPU"),
)


def fill(folder: Path) -> dict[str, str]:
    """Write a draft with photos, bases and a plan, and a training that was stopped; return the views by name."""
    store = Store(folder)
    store.create()
    root = folder / "photos"
    root.mkdir()
    names = [shutil.copy(path, root) and path.name for path in sorted(PHOTOS.glob("*.png"))[:24]]
    draft = Draft(str(root), base="/models/one.safetensors", choices={names[3]: Choice(is_out=True)})
    store.save(draft)
    photos = [
        {"name": name, "caption": "a heart", "problems": ["blurred"] if n == 2 else []} for n, name in enumerate(names)
    ]
    left_out = [["broken.png", "cannot be read (damaged)"]]
    found = {"folders": [{"path": str(root), "photos": photos, "left_out": left_out}], "trigger": "zheart"}
    store.write(draft.id, "photos.json", found)
    planned = {
        "lines": LINES,
        "remarks": ["a remark"],
        "steps": 900,
        "seconds": 60.0,
        "texts": {"prompts": "zheart\na dog"},
    }
    store.write(draft.id, "plan.json", {**planned, "digest": draft.digest})
    facts = {"family": "Stable Diffusion 1.x", "bytes": 2 * 10**9, "is_distilled": True, "prediction": "v"}
    bases = [
        {"path": f"/models/{name}.safetensors", "name": f"{name}.safetensors", **facts, "fit": {**FIT, "ways": ways}}
        for name, ways in (("one", ["recomputed", "int8"]), ("two", None))
    ]
    store.write("bases", "bases.json", {"bases": bases, "folders": [], "published": PUBLISHED})
    job = Job("train_network.py", str(folder / "cat.toml"), "", (), str(folder), str(folder / "cat"), None)
    write_whole(store.stopped / f"{id_of(job)}.json", job.as_text())
    (folder / f"cat{ENDING}").write_text(RELOADS)
    write_reports(store.output)
    views = {name: f"#/{name}/{draft.id}" for name in ("photos", "base", "plan")}
    return {"home": "#/", "history": "#/history", **views, "run": f"#/run/{id_of(job)}"}


def write_reports(output: Path) -> None:
    """Write reports of three runs on two base models, the first of which has the record of train.py."""
    rng = random.Random(0)
    for number, (name, base, loss) in enumerate((("cat", "one", 0.3), ("dog", "one", 0.1), ("owl", "two", 0.2))):
        folder = output / name
        folder.mkdir()
        begin = start(name, pretrained_model_name_or_path=f"/models/{base}.safetensors")
        steps = [step(n, rng, loss) for n in range(1, 11)]
        lines = lines_of([begin, plan(10), *steps], STARTED - 100 * number)
        (folder / "events.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        (folder / f"{name}{ENDING}").write_text(build_report(read_events(folder / "events.jsonl")))
        if number == 0:
            record = Record("1 photo (x)", "y", "zcat, a cat", f"/models/{base}.safetensors", "character")
            (folder / f"{name}.toml").write_text(record.line)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Browser, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("looks")
    views = fill(folder)
    with serving(folder) as server, browsing(folder) as browser:
        first = browser.open(server.address.first_url)
        first.see("Train a LoRA on your photos")
        first.call("Page.close")  # browsers keep few connections to a server, and each page holds one
        yield server, browser, views


def open_view(opened: tuple[Server, Browser, dict[str, str]], name: str, *size: int, dark: bool = False) -> Tab:
    server, browser, views = opened
    tab = browser.open(server.address.url + views[name], *size, dark=dark)
    heading = {"run": "cat", "history": "All runs", "base": "Base model", "photos": "Photos", "plan": "Plan"}.get(name)
    tab.when(f"return document.querySelector('h1')?.textContent.startsWith({json.dumps(heading or 'Train')})")
    return tab


@pytest.mark.parametrize("name", ["home", "history", "photos", "base", "plan", "run"])
def test_axe_finds_nothing_and_no_width_scrolls_sideways(opened: Any, name: str) -> None:
    for width, height in SIZES:
        for dark in (False, True):
            tab = open_view(opened, name, width, height, dark=dark)
            tab.run(AXE.read_text(encoding="utf-8"))
            violations = tab.run(
                f"axe.run(document, {RULES}).then(({{violations}}) => JSON.stringify(violations.map(({{id, nodes}}) => "
                "[id, ...nodes.map(({html, failureSummary}) => html.slice(0, 200) + failureSummary)])))"
            )
            assert json.loads(violations) == [], (name, width, dark)
            assert tab.run("document.documentElement.scrollWidth") == width
            tab.call("Page.close")
    assert opened[1].told == []


def test_the_bases_say_how_they_fit_and_what_the_hub_has(opened: Any) -> None:
    tab = open_view(opened, "base", *SIZES[1])
    tab.see("fits this GPU: 9.5 of 11.8 GiB, recomputed, in 8 bits")
    tab.see("does not fit this GPU: 9.5 of 11.8 GiB")
    tab.click("Download a base model from the Hugging Face hub")
    tab.see("one.safetensors · 6.9 GB · MIT")
    assert tab.run("document.querySelector('details a').href") == "https://huggingface.co/me/one"
    tab.click("Download one.safetensors")  # tests reach no hub
    tab.see("This did not work: --base me/one cannot be downloaded")
    tab.call("Page.close")


def test_all_runs_are_searched_filtered_sorted_and_compared(opened: Any) -> None:
    tab = open_view(opened, "history", *SIZES[1])
    shown = "[...document.querySelectorAll('.list li > div > a')].map((one) => one.textContent).join()"
    tab.see("3 of 3 runs")
    assert tab.run(shown) == "cat,dog,owl"
    tab.choose("Sort by", "loss")
    assert tab.run(shown) == "dog,owl,cat"
    tab.choose("Base model", "one.safetensors")
    assert tab.run(shown) == "dog,cat"
    tab.choose("Trigger word", "zcat, a cat")
    assert tab.run(shown) == "cat"
    tab.choose("Trigger word", "")
    tab.choose("Base model", "")
    tab.click("Search")
    tab.call("Input.insertText", text="OWL")
    tab.see("1 of 3 runs")
    assert tab.run(shown) == "owl"
    tab.run("document.activeElement.select()")
    tab.call("Input.insertText", text="a")
    for name in ("cat", "owl"):
        tab.click(f"Compare {name}")
    address = tab.when("return document.querySelector('a.button.main:not([hidden])')?.href")
    compared = opened[1].open(address)
    compared.see("2 runs")
    compared.see("Training loss, smoothed")
    one = opened[1].open(tab.run("document.querySelector('.list li > div > a').href"))
    one.when("return document.querySelector('h1')?.textContent")
    assert opened[0].send("GET", address.replace("cat%2Fcat", "..%2Fcat").partition(str(opened[0].port))[2])[0] == 404
    tab.call("Page.close")


def test_a_report_reloads_itself_in_its_own_origin(opened: Any) -> None:
    """Its requests count as another site's, so they have no cookie."""
    tab = open_view(opened, "run", *SIZES[1])
    assert tab.run("location.pathname + location.search") == "/"
    address = tab.when("return document.querySelector('iframe')?.src")
    report = opened[1].open(address)
    report.see("loaded by reload")
    assert report.run("self.origin") == "null"
    assert tab.run("document.querySelector('a[target=_blank]').href") == address
    tab.call("Page.close")


def test_a_keyboard_reaches_and_uses_every_control_of_the_photos(opened: Any) -> None:
    tab = open_view(opened, "photos", *SIZES[1])
    tab.see("23 of 24 photos are trained")
    reached: list[str] = []
    tab.press("Tab")
    for _ in range(200):
        name = tab.run("document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent.trim()")
        if name == "heart_01.png: trained":
            break
        reached.append(name)
        tab.press("Tab")
    assert {"Replace all", "Write missing captions", "Next: base model", "Caption of heart_00.png"} <= {*reached}
    tab.press("Enter")
    tab.see("22 of 24 photos are trained")
    tab.press("Enter")
    tab.see("23 of 24 photos are trained")
    tab.run("document.getElementById('home').focus()")
    tab.press("Enter")
    tab.click("Use a folder of this computer")
    tab.when("return document.querySelector('dialog[open]')")
    tab.press("Escape")
    tab.when("return !document.querySelector('dialog')")
    assert tab.run("document.activeElement.textContent") == "Use a folder of this computer"


def test_thumbnails_are_loaded_as_they_come_into_sight(opened: Any) -> None:
    tab = open_view(opened, "photos", 390, 600)
    tab.see("of 24 photos are trained")
    assert tab.run("document.querySelector('.photo img').decode().then(() => true)")
    assert tab.run("document.querySelectorAll('.photo img[loading=lazy]').length") == 24


def test_3000_photos_scroll_with_the_thumbnails_in_sight(tmp_path: Path) -> None:
    store, root = Store(tmp_path / "suite"), tmp_path / "photos"
    store.create()
    root.mkdir()
    photo, names = next(PHOTOS.glob("*.png")), [f"{number:04}.png" for number in range(3000)]
    for name in names:
        (root / name).hardlink_to(photo)
    draft = Draft(str(root))
    store.save(draft)
    photos = [{"name": name, "caption": "a heart", "problems": []} for name in names]
    store.write(draft.id, "photos.json", {"folders": [{"path": "", "photos": photos, "left_out": []}], "trigger": "x"})
    with serving(store.folder) as server, browsing(tmp_path) as browser:
        browser.open(server.address.first_url).see("Train a LoRA on your photos")
        tab = browser.open(f"{server.address.url}#/photos/{draft.id}")
        tab.see("3000 of 3000 photos are trained")
        last = "document.querySelectorAll('.photo img')[2999]"
        assert tab.run("document.querySelector('.photo img').decode().then(() => true)")
        assert not tab.run(f"{last}.complete && {last}.naturalWidth")
        tab.click("2999.png: trained")
        tab.see("2999 of 3000 photos are trained")
        assert tab.run(f"{last}.decode().then(() => true)")
        assert len([*store.thumbnails.iterdir()]) < 500  # the rest was never made
        assert browser.told == []


def test_every_text_that_the_scripts_name_is_in_the_file() -> None:
    static = ROOT / "library" / "page" / "static"
    texts = json.loads((ROOT / "library" / "page" / "texts.json").read_text(encoding="utf-8"))
    for script in static.glob("*.js"):
        source = script.read_text(encoding="utf-8")
        for name in re.findall(
            r"""\bt\("([\w.]+)"|"((?:home|browse|history|photos|base|plan|run|options)\.[\w.]+)\"""", source
        ):
            value = texts
            for key in (name[0] or name[1]).split("."):
                assert key in value, (script.name, name)
                value = value[key]
            assert isinstance(value, str), name
    assert f"port instead of {PORT}" in (ROOT / "docs" / "page.md").read_text(encoding="utf-8")
