"""The report as rendered by a browser."""

from pathlib import Path

import pytest

from library.base.atomic_files import write_whole
from library.training.report_page.comparison import build_comparison
from library.training.report_page.page import read_data
from library.training.report_page.record import Record
from library.training.report_page.writer import build_report
from library.training.reporting.events import Warned
from library.training.sweep.ranking import rank_and_write
from library.training.sweep.worker import Standing
from tests.browser import in_browser
from tests.chromium import ask
from tests.event_lines import EVIL, lines_of, thumbnail, whole_run

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
