"""The report of a run, its pages in a browser, and --log_events validated with docs/events.schema.json."""

import json
import re
import subprocess
import sys
from base64 import b64decode
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from library.base.atomic_files import write_whole
from library.environment.running import child_environment
from library.training.report_page.comparison import build_comparison
from library.training.report_page.page import read_data
from library.training.report_page.record import Record
from library.training.report_page.writer import build_report, read_report
from library.training.reporting.events import Warned
from library.training.sweep.ranking import rank_and_write
from library.training.sweep.worker import Standing
from tests.browser import in_browser
from tests.chromium import ask
from tests.event_lines import EVIL, lines_of, thumbnail, whole_run
from tests.running import ROOT, Finished
from tools import report, start

Train = Callable[..., Finished]


@pytest.fixture
def arguments(base_arguments: list[str]) -> list[str]:
    """Return the usual arguments, with the report enabled."""
    return [word for word in base_arguments if word != "--no_report"]


def test_the_report_of_a_run_equals_the_report_built_from_its_events(
    train: Train, arguments: list[str], tmp_path: Path
) -> None:
    """This also holds after resuming: the report takes earlier steps from the existing one."""
    (tmp_path / "prompts.txt").write_text("a </script> cat --w 64 --h 64 --s 1\na dog --w 64 --h 64 --s 1\n")
    events, written, rebuilt = tmp_path / "events.jsonl", tmp_path / "out" / "mine-report.html", tmp_path / "made.html"
    words = [
        *arguments, "--log_events", str(events), "--validation_split", "0.34", "--sample_prompts",
        str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "3", "--save_state", "--autoresume",
    ]  # fmt: skip
    for num_steps in ("4", "7"):
        train([*words, "--max_train_steps", num_steps]).ok()
        assert report.main([str(events), "--output", str(rebuilt)]) == 0
        assert rebuilt.read_bytes() == written.read_bytes()
    record = read_report(written)
    assert record.step == 7 and [item["first_step"] for item in record.sessions] == [0, 4]
    assert len(record.curves.by_name["loss"].total) == 7 and [item["step"] for item in record.previews.items] == [3, 6]
    assert [(item["name"], item["step"]) for item in record.files if item["kind"] == "weights"] == [
        ("mine.safetensors", 7)
    ]
    assert record.plan is not None and record.plan["resumed_from"].endswith("mine-state")
    file_names = sorted(re.sub(r"_\d{14}", "", path.name) for path in (tmp_path / "out").iterdir())
    assert file_names == ["mine-report.html", "mine-state", "mine.safetensors", "sample", "sample_grid"]


def test_a_partial_report_of_a_killed_run_is_deleted(train: Train, arguments: list[str], tmp_path: Path) -> None:
    assert train([*arguments, "--save_state", "--max_train_steps", "1"]).status == 0
    half, of_others = (tmp_path / "out" / f".{name}-report.0123456789ab.html" for name in ("mine", "other"))
    half.write_text("<!doctype ht")
    of_others.write_text("<!doctype ht")
    assert train([*arguments, "--autoresume", "--max_train_steps", "2"]).status == 0
    assert not half.exists() and of_others.exists()


def test_the_report_says_why_a_run_ended_early(
    train: Train, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the <b>card</b> is gone")

    monkeypatch.setattr("library.training.loop.steps.report_step", fail)
    assert train(arguments).status == 1
    end = read_report(tmp_path / "out" / "mine-report.html").sessions[-1]["end"]
    assert end["reason"] == "error" and "the <b>card</b> is gone" in end["error"]


@pytest.mark.parametrize("words", [["--no_report"], ["--dry_run"], ["--network_args", "conv_dim=x"]])
def test_no_report_is_written_if_disabled_or_if_nothing_is_trained(
    train: Train, arguments: list[str], tmp_path: Path, words: list[str]
) -> None:
    train([*arguments, *words])
    assert not list(tmp_path.rglob("*report*"))


def test_a_file_without_events_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("a,b\n1,2\n")
    assert report.main([str(path)]) == 1
    assert "line 1 is not an event" in capsys.readouterr().err
    path.write_text("")
    assert report.main([str(path)]) == 1
    assert f"{path} has no events; use the file written by --log_events" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [path]


def test_the_quickstarts_report_shows_images_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run both commands of the quickstart, shortened."""
    (tmp_path / "prompts.txt").write_text("a small blue heart on a gray background --w 64 --h 64 --s 2 --l 2 --d 1\n")
    python = Path(sys.executable)
    names = {"ADAPTER": "quickstart.safetensors", "IMAGE": "image.png", "REPORT": "quickstart-report.html"}
    for constant, name in {**names, "PROMPTS": "prompts.txt"}.items():
        monkeypatch.setattr(start, constant, str(tmp_path / name))
    for command in ([*start.training_command(python), "--steps", "1"], start.image_command(python)):
        done = subprocess.run(command, cwd=start.ROOT, env=child_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    shown = read_report(tmp_path / "quickstart-report.html")
    assert shown.step == 1 and shown.sheet is not None
    with (
        Image.open(BytesIO(b64decode(shown.sheet.partition(",")[2]))) as image,
        Image.open(tmp_path / "image.png") as drawn,
    ):
        assert image.size == drawn.size


# The report as rendered by a browser.

LOOK = """
const drawn = [...document.querySelectorAll("canvas")].map((canvas) => {
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const colours = new Set();
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 200) colours.add(data.slice(i, i + 3).join());
  return colours.size;
});
const range = document.querySelector("input[type=range]");
const shown = () => [document.querySelector("output").textContent,
  ...[...document.querySelectorAll(".shown img")].map((img) => img.src)];
await Promise.all([...document.querySelectorAll(".shown img")].map((img) => img.decode()));
const last = shown();
range.value = 0;
range.dispatchEvent(new Event("input"));
await Promise.all([...document.querySelectorAll(".shown img")].map((img) => img.decode()));
const texts = (selector) => [...document.querySelectorAll(selector)].map((one) => one.textContent);
return {
  drawn, last, first: shown(), title: document.title, text: document.body.innerText,
  points: Math.max(...plots.map((plot) => plot.data[0].length)),
  headings: texts("h2"), captions: texts(".shown figcaption"), width: document.documentElement.scrollWidth,
  images: document.querySelectorAll("img:not([src^='data:'])").length,
};
"""


@pytest.fixture(scope="module")
def page() -> str:
    """Build the report of a run of 100,000 steps whose texts attempt script injection."""
    record = Record()
    for line in lines_of(whole_run(1000)):
        for more in range(100) if line["event"] == "step" else [99]:
            number = line.get("step", 0)
            is_told = number and line["event"] != "end"
            record.add({**line, "step": (number - 1) * 100 + more + 1} if is_told else line)
    return build_report(record)


def test_the_page_of_a_run_of_100000_steps_is_small(page: str) -> None:
    assert len(page) < 1_000_000
    columns = read_data(page)["curves"]["columns"]
    assert max(len(column["total"]) for column in columns.values()) == 782 and len(columns) > 15


@in_browser
def test_charts_are_drawn_the_slider_works_and_texts_are_escaped(page: str, tmp_path: Path) -> None:
    result, errors = ask(page, LOOK, tmp_path)
    assert errors == [] and "failed" not in result, (errors, result)
    assert result["headings"] == [
        "Warnings", "Loss", "Validation", "Previews", "Scores of the previews", "Which file to keep", "Saved files",
        "Optimization", "Speed and memory", "Data", "Run",
    ]  # fmt: skip
    assert len(result["drawn"]) == 15 and min(result["drawn"]) >= 3  # axes, grid, and at least one line
    assert result["points"] == 782  # of 128 steps each
    assert result["title"] == "cat: finished" and result["images"] == 0
    assert result["last"][0] == "step 100000" and result["first"][0] == "step 10000"
    assert len(result["last"]) == len(result["first"]) == 4 and not set(result["last"]) & set(result["first"])
    assert result["captions"] == ["a cat", EVIL, "a dog"]
    assert result["text"].count("onerror=") >= 6  # prompt, folder, image, tag, warning, file
    assert "8 GiB, 0.19 s" in result["text"]
    assert "70, -0.04 (-0.06 to -0.02)" in result["text"]  # sharpness before training
    assert "cat-step00000200.safetensors, step 20000: the others are worse" in result["text"]
    assert result["text"].count("suggested") == 2  # in the comparison and beside the file
    assert result["width"] <= 1250 and "lowest validation loss" in result["text"]


@in_browser
def test_the_page_follows_the_system_colour_scheme(page: str, tmp_path: Path) -> None:
    light, _ = ask(page, "return getComputedStyle(document.body).backgroundColor;", tmp_path / "light")
    dark_page = page.replace("(prefers-color-scheme: dark)", "(min-width: 1px)", 1)
    dark, errors = ask(dark_page, "return getComputedStyle(document.body).backgroundColor;", tmp_path / "dark")
    assert (light, dark, errors) == ("rgb(255, 255, 255)", "rgb(21, 24, 28)", [])


@in_browser
def test_the_page_of_a_run_that_has_just_begun_is_shown(tmp_path: Path) -> None:
    lines = lines_of(whole_run(40))
    plan = next(i for i, line in enumerate(lines) if line["event"] == "plan")
    for number in (plan + 1, plan + 4):
        record = Record()
        for line in lines[:number]:
            record.add(line)
        record.sheet = thumbnail(number)
        script = "const sheet = document.querySelector('img.sheet'); await sheet.decode(); return document.title;"
        result, errors = ask(build_report(record), script, tmp_path)
        assert (result, errors) == ("cat: running or killed", [])


LAYOUT = """
const below = plots.map((plot) => plot.height - (plot.bbox.top + plot.bbox.height) / devicePixelRatio);
const free = [...document.querySelectorAll(".charts")].map((grid) =>
  grid.getBoundingClientRect().right - grid.lastElementChild.getBoundingClientRect().right);
return {below, free};
"""


@in_browser
def test_no_space_is_left_below_or_beside_charts(page: str, tmp_path: Path) -> None:
    result, errors = ask(page, LAYOUT, tmp_path)
    assert errors == [] and len(result["below"]) == 15
    assert max(result["below"]) <= 32  # the numbers of the axis
    assert len(result["free"]) == 5 and max(result["free"]) < 1


PRINT = """
plots.forEach((plot) => plot.setSize({width: 1100, height: 300}));
await new Promise((resolve) => queueMicrotask(resolve));  // uPlot draws then
const inside = [...document.querySelectorAll("canvas")].map((canvas) => {
  const [inner, outer] = [canvas, canvas.closest(".chart")].map((one) => one.getBoundingClientRect());
  return inner.width > 300 && inner.right <= outer.right && inner.bottom <= outer.bottom;
});
const style = (one) => getComputedStyle(document.querySelector(one));
const breaks = [".chart", ".shown figure", "tr"].map((one) => style(one).breakInside);
return {inside, breaks, heading: style("h2").breakAfter};
"""


@in_browser
def test_printing_cuts_no_chart(page: str, tmp_path: Path) -> None:
    """Check the style for paper on a screen of its width, with charts that keep the size of a wide window."""
    assert page.count("@media print") == 1
    on_paper = page.replace("@media print {", "@media screen { main { width: 640px; }")
    result, errors = ask(on_paper, PRINT, tmp_path)
    assert errors == [] and len(result["inside"]) == 15 and all(result["inside"])
    assert (result["breaks"], result["heading"]) == (["avoid"] * 3, "avoid")


BARS = """
const plot = plots.at(-1);
// A chart of a box without a layout yet has the smallest width, until the box gets its size.
for (let i = 0; i < 100 && plot.width === 200; i++) await new Promise((done) => setTimeout(done, 20));
const canvas = plot.root.querySelector("canvas");
const row = Math.round(plot.bbox.top + plot.bbox.height * 0.6);
const {data} = canvas.getContext("2d").getImageData(0, row, canvas.width, 1);
const isBar = (x) => data[4 * x + 2] - data[4 * x] > 40 && data[4 * x + 3] > 100;
const bars = [];
for (let x = 0; x < canvas.width; x++)
  if (isBar(x)) (x && isBar(x - 1)) ? bars.at(-1)[1]++ : bars.push([x, 1]);
const {left, width} = plot.bbox;
return {bars, left, right: left + width, scale: plot.scales.x, ratio: devicePixelRatio};
"""


@in_browser
@pytest.mark.parametrize("counts", [[[9, 32]], [[8, 20], [9, 32]], [[5, 20], [9, 18], [300, 32]]])
def test_each_caption_length_is_a_whole_bar(tmp_path: Path, counts: list[list[int]]) -> None:
    """Captions of one length make one bar over that length alone."""
    record = Record()
    for line in lines_of(whole_run(20)):
        if line["event"] == "audit":
            line["caption_lengths"]["counts"] = counts
        record.add(line)
    result, errors = ask(build_report(record), BARS, tmp_path)
    assert errors == []
    assert len(result["bars"]) == len(counts) - (counts[-1][0] == 300)  # bins of five: 5 and 9 share one
    lengths = (result["right"] - result["left"]) / (result["scale"]["max"] - result["scale"]["min"])  # pixels of one
    for left, width in result["bars"]:
        assert left > result["left"] and left + width <= result["right"]
        assert width <= 62 * result["ratio"] and width < 5 * lengths


@in_browser
def test_only_the_first_warnings_are_unfolded(tmp_path: Path) -> None:
    record = Record()
    for line in lines_of([*whole_run(20), *(Warned("warning", "a", f"warning {n}") for n in range(7))]):
        record.add(line)
    script = """
      const heading = document.querySelector("h2"), folded = heading.parentElement.querySelector("details");
      return [heading.textContent, folded.querySelectorAll("td").length / 3, folded.open, folded.innerText];
    """
    result, errors = ask(build_report(record), script, tmp_path)
    assert errors == [] and result[:3] == ["Warnings", 3, False] and result[3].startswith("3 more")


COMPARE = """
const range = document.querySelector("input[type=range]");
const captions = () => [...document.querySelectorAll(".shown figcaption")].map((one) => one.textContent);
const last = captions();
range.value = 0;
range.dispatchEvent(new Event("input"));
return {
  last, first: captions(), title: document.title,
  headings: [...document.querySelectorAll("h2")].map((h) => h.textContent),
  lines: plots.map((plot) => plot.data.slice(1).filter((values) => values.some((value) => value !== null)).length),
  x: plots[0].data[0], text: document.body.innerText, width: document.documentElement.scrollWidth,
};
"""


@in_browser
def test_runs_are_compared_on_one_axis_and_side_by_side(tmp_path: Path) -> None:
    """Compare a run of 20 steps with one of 2,500, whose points cover four steps each."""
    paths = []
    for number, num_steps in enumerate((20, 2500)):
        record = Record()
        for line in lines_of(whole_run(num_steps, name=f"run{number}", seed=number)):
            record.add(line)
        paths.append(tmp_path / f"{number}-report.html")
        write_whole(paths[-1], build_report(record))
    result, errors = ask(build_comparison(paths), COMPARE, tmp_path)
    assert errors == [], errors
    assert result["headings"] == ["Differences", "Losses", "Validation", "Previews", "Training"]
    assert result["title"] == "run0 and run1" and result["width"] <= 1250
    assert result["x"] == sorted({*range(1, 21), *range(4, 2501, 4)})
    assert len(result["lines"]) == 10 and min(result["lines"]) >= 2
    assert "--learning_rate" in result["text"] and "max train steps" in result["text"]
    assert result["last"][:2] == ["run0, step 20: a cat", "run1, step 2500: a cat"]
    assert result["first"][:2] == ["run0, step 2: a cat", "run1, none: a cat"]
    assert result["first"][2:4] == [f"run0, step 2: {EVIL}", f"run1, none: {EVIL}"]


def by_image(*losses: float) -> dict[str, float]:
    return {f"digest {number}": loss for number, loss in enumerate(losses)}


@in_browser
def test_the_adapters_of_a_sweep_are_shown_in_order_of_loss(tmp_path: Path) -> None:
    """Their names may come from untrusted values."""
    runs = [
        Standing("lr1", 8, 8, by_image(2.0, 3.0, 2.5), "", "lr1.safetensors"),
        Standing(EVIL, 8, 8, by_image(1.0, 2.1, 1.5), "", None),
        Standing("lr9", 3, None, {}, "its losses were not finite", None),
    ]
    page = tmp_path / "cat-sweep.html"
    rank_and_write(runs, "cat", page, [], {}, {})
    script = "return [...document.querySelectorAll('tr')].map((tr) => [...tr.children].map((td) => td.textContent));"
    rows, errors = ask(page.read_text(encoding="utf-8"), script, tmp_path)
    assert errors == []
    assert [row[:3] for row in rows[1:]] == [["1", EVIL, "8"], ["2", "lr1", "8"], ["–", "lr9", "3"]]
    assert rows[2][5:7] == ["significantly worse", "lr1.safetensors"] and rows[3][7] == "its losses were not finite"


@in_browser
def test_the_page_of_a_sweep_has_a_grid_charts_previews_and_links(tmp_path: Path) -> None:
    chosen = {
        f"lr{rate}-dim{rank}": {"learning_rate": rate, "network_dim": rank}
        for rate in ("1e-4", "2e-4", EVIL)
        for rank in ("8", "16")
    }
    measured, reports = [], {}
    for number, label in enumerate(chosen):
        record = Record()
        for line in lines_of(whole_run(20, name=label, seed=number)):
            record.add(line)
        reports[label] = tmp_path / f"cat-{number}-report.html"
        write_whole(reports[label], build_report(record))
        losses = by_image(1.0 + number, 2.1, 1.5 + number)
        measured.append(Standing(label, 20, 20, losses, "", f"{number}.safetensors"))
    page = tmp_path / "cat-sweep.html"
    rank_and_write(measured, "cat", page, [], chosen, reports)
    script = """
      const row = (tr) => [...tr.children].map((td) => td.textContent);
      const cells = (table) => [...table.querySelectorAll("tr")].map(row);
      const [ranks, grid] = [...document.querySelectorAll("table")].map(cells);
      return {ranks, grid, headings: [...document.querySelectorAll("h2")].map((one) => one.textContent),
        links: [...document.querySelectorAll("a")].map((a) => a.getAttribute("href")),
        charts: document.querySelectorAll("canvas").length, images: document.querySelectorAll(".shown img").length};
    """
    result, errors = ask(page.read_text(encoding="utf-8"), script, tmp_path)
    assert errors == [], errors
    assert result["headings"] == ["Validation loss by option", "Losses", "Validation", "Previews", "Training"]
    assert result["links"] == [reports[row[1]].name for row in result["ranks"][1:]] and len(result["links"]) == 6
    assert result["grid"][0] == ["learning_rate \\ network_dim", "8", "16"] and result["grid"][3][0] == EVIL
    assert result["grid"][1][1] == "1.533" and result["charts"] == 10 and result["images"] == 18


# --log_events of complete runs, validated with docs/events.schema.json.

SCHEMA = json.loads((ROOT / "docs" / "events.schema.json").read_text(encoding="utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)


def events_of(path: Path) -> list[dict[str, Any]]:
    """Return the events of a file after validating each with the schema."""
    text = path.read_text(encoding="ascii")
    assert text.endswith("\n")
    events = [json.loads(line) for line in text.splitlines()]
    for event in events:
        VALIDATOR.validate(event)
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    return events


def of_kind(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


def test_a_run_logs_an_event_for_everything_that_happens(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    """Run with validation, previews, saved and rotated files, caching, a damaged image, and a warning."""
    (tmp_path / "prompts.txt").write_text("a red cat --w 64 --h 128 --s 2 --d 3\n")
    (tmp_path / "data" / "2_thing" / "broken.png").write_bytes(b"no image")
    file = tmp_path / "new" / "events.jsonl"
    done = train(
        [
            *base_arguments, "--log_events", str(file), "--validation_split", "0.34", "--max_train_steps", "12",
            "--validate_every_n_steps", "4", "--validate_at_first", "--sample_prompts", str(tmp_path / "prompts.txt"),
            "--sample_every_n_steps", "12", "--save_every_n_steps", "4", "--save_last_n_steps", "6", "--cache_latents",
            "--huggingface_token", "hf_secret", "--log_prefix", "idle", "--network_args", "loraplus_lr_ratio=4",
            "--keep_best_checkpoint", "--save_state_on_train_end",
        ]
    ).ok()  # fmt: skip
    events = events_of(file)
    elsewhere = {"finding", "forgetting", "strengths", "scores"}  # of audits, probes, --am, --score_previews
    assert set(Counter(event["event"] for event in events)) == {*SCHEMA["properties"]["event"]["enum"]} - elsewhere
    assert "hf_secret" not in file.read_text()

    start = events[0]
    assert start["event"] == "start" and start["options"]["max_train_steps"] == 12 and "torch" in start["versions"]
    assert start["command"][start["command"].index("--huggingface_token") + 1] == "***"
    assert "huggingface_token" not in start["options"] and "v_parameterization" not in start["options"]

    (audit,) = of_kind(events, "audit")
    (dataset,) = audit["datasets"]
    assert dataset["buckets"] == [{"width": 64, "height": 64, "num_draws": 8, "num_batches": 4}]
    assert audit["num_dropped"] == 1 and audit["dropped"][0]["file"].endswith("broken.png")
    assert sum(count for _, count in audit["caption_lengths"]["counts"]) == 4
    assert audit["caption_lengths"]["unit"] == "tokens" and audit["caption_lengths"]["most"] == 75
    assert sum(count for _, count in audit["tags"]) == 16

    stages = [(stage["name"], stage["state"]) for stage in of_kind(events, "stage")]
    for name in ("loading", "caching latents", "training", "validation steps", "previews"):
        assert stages.index((name, "begin")) < stages.index((name, "end"))
    caching = [stage for stage in of_kind(events, "stage") if stage["name"] == "caching latents"]
    assert caching[-1]["done"] == caching[-1]["total"] == 6

    steps = of_kind(events, "step")
    assert [step["step"] for step in steps] == list(range(1, 13))
    assert [bool(step["norms"]) for step in steps] == [step in (1, 11) for step in range(1, 13)]
    shown = [float(f"{step['average']:.3g}") for step in steps]
    assert shown == [pytest.approx(loss, rel=1e-6) for loss in done.losses]
    for measured in (steps[0], steps[10]):
        squares = [norms["gradient"] ** 2 for norms in measured["norms"].values()]
        assert len(squares) == 4  # up and down matrices of both models
        assert sum(squares) ** 0.5 == pytest.approx(measured["gradient_norm"], rel=1e-5)
    assert steps[0]["timing"] is None and steps[5]["timing"]["step"] == 5

    validations = of_kind(events, "validation")
    assert [stage["step"] for stage in validations] == [0, 4, 8, 12]
    assert validations[0]["compared"] is None and validations[1]["compared"]["to_step"] == 0
    levels = [level["loss"] for level in validations[2]["levels"]]
    assert sum(levels) / len(levels) == pytest.approx(validations[2]["loss"], rel=1e-9)

    (preview,) = of_kind(events, "preview")
    assert preview["prompt"] == "a red cat" and (preview["width"], preview["height"], preview["seed"]) == (64, 128, 3)
    saved, removed = of_kind(events, "saved"), of_kind(events, "removed")
    last = {Path(stage["file"]).name: stage for stage in saved if stage["kind"] == "weights"}
    assert {name: stage["reason"] for name, stage in last.items()} == {
        "mine-step00000004.safetensors": "step",
        "mine-step00000008.safetensors": "step",
        "mine.safetensors": "end",
        "mine-step00000012.safetensors": "step",
        "mine-best.safetensors": "best",
    }
    assert last["mine.safetensors"]["num_bytes"] == (tmp_path / "out" / "mine.safetensors").stat().st_size
    assert [Path(stage["file"]).name for stage in removed] == ["mine-step00000004.safetensors"]
    assert [Path(stage["file"]).name for stage in saved if stage["kind"] == "state"] == ["mine-state"]

    assert any("--log_prefix has no effect" in stage["text"] for stage in of_kind(events, "warning"))
    end = events[-1]
    assert (end["event"], end["reason"], end["step"], end["error"]) == ("end", "finished", 12, None)
    assert end["file"].endswith("mine.safetensors") and "a step took" in end["summary"]


def test_events_do_not_change_training_and_a_resumed_run_appends_to_the_file(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "events.jsonl"
    arguments = [*base_arguments, "--network_dropout", "0.2", "--mixed_precision", "bf16"]
    command = [*arguments, "--log_events", str(file), "--autoresume"]
    assert train([*arguments, "--output_name", "silent"]).status == 0
    file.write_text("")
    assert train([*command, "--save_every_n_steps", "2", "--save_state", "--lr_scheduler", "constant"]).status == 0
    out = tmp_path / "out"
    from safetensors.torch import load_file

    silent, logged = load_file(out / "silent.safetensors"), load_file(out / "mine.safetensors")
    assert all(tensor.equal(logged[key]) for key, tensor in silent.items())

    with file.open("a") as half:
        half.write('{"v":1,"event":"st')  # as a killed process may leave it
    assert train([*command, "--max_train_steps", "6"]).status == 0
    events = events_of(file)
    plans = of_kind(events, "plan")
    assert [event["first_step"] for event in plans] == [0, 4] and plans[1]["resumed_from"].endswith("mine-state")
    assert [event["step"] for event in of_kind(events, "step")] == [1, 2, 3, 4, 5, 6]
    assert train([*command, "--max_train_steps", "6"]).status == 0
    assert [event["reason"] for event in of_kind(events_of(file), "end")] == [
        "finished",
        "finished",
        "already complete",
    ]


def test_standard_output_contains_only_events(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    done = train([*base_arguments, "--log_events", "-"]).ok()
    for line in done.stdout.splitlines():
        VALIDATOR.validate(json.loads(line))
    assert "training: 12 images" in done.stderr


def test_an_error_is_an_event_and_a_dry_run_writes_none(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "events.jsonl"
    file.write_text('{"v":1,"event":"of an earlier run"}\n')  # a fresh run truncates it
    missing = [*base_arguments, "--log_events", str(file), "--network_args", "conv_dim=four"]
    assert train(missing).status == 1
    end = events_of(file)[-1]
    assert (end["reason"], end["step"]) == ("error", None) and "conv_dim" in end["error"]
    file.unlink()
    done = train([*base_arguments, "--log_events", str(file), "--dry_run"])
    assert done.status == 0 and not file.exists()
    assert "--log_events has no effect with --dry_run" in done.stderr


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["--log_events", "-", "--console_log_simple"], "both write to standard output"),
        (["--log_events", "{tmp}/data"], "is a folder"),
        (["--log_events", "{tmp}/data/2_thing/00.png"], "is a PNG image, not an event log"),
    ],
)
def test_an_unwritable_event_path_is_rejected(
    train: Train, base_arguments: list[str], tmp_path: Path, given: list[str], wanted: str
) -> None:
    done = train([*base_arguments, *(word.format(tmp=tmp_path) for word in given)])
    assert done.status == 1 and "--log_events" in done.stderr + done.stdout and wanted in done.stderr + done.stdout
