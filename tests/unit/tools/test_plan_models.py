"""The kept counts and the table of the page match what benchmarks/plan_models.py counts and plans."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu_step import STEP_MODES
from benchmarks.plan_models import CARDS, FORMATS, arguments_for, count_model, gpus_of, longer_lines, table, to_json
from benchmarks.results_page import PAGE, put_into
from library.commands.counted_plan import count
from library.memory.planner import gpus
from library.memory.planner.gpus import LINUX, TYPICAL, WINDOWS, find_system, parse_cards
from library.memory.planner.known import FILE, load_models, plan
from library.training.planning.fit import fit_to
from tests.contracts.header_only import FULL_SIZE
from tests.running import ROOT

# A model takes up to 6 CPU seconds. Those that are not listed are nightly.
SLOW = ("Anima", "FLUX.1")

pytestmark = pytest.mark.usefixtures("fresh_process")  # parsing options sets up logging


def tier_of(title: str) -> pytest.MarkDecorator:
    return pytest.mark.slow if title in SLOW else pytest.mark.nightly


@pytest.mark.parametrize("title", [pytest.param(title, marks=tier_of(title)) for title in FULL_SIZE])
def test_the_kept_counts_are_those_of_the_planner(title: str) -> None:
    (kept,) = (entry for entry in json.loads(FILE.read_text(encoding="utf-8")) if entry["title"] == title)
    assert json.loads(to_json([count_model(title)])) == [kept]


@pytest.mark.slow
def test_a_plan_of_kept_counts_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    model = FULL_SIZE["FLUX.1"]
    _, counted = count(model.script, arguments_for(model, tmp_path))
    counted = replace(counted, options=counted.options.with_values({"fit_formats": list(FORMATS)}))
    (known,) = (known for known in load_models() if known.title == "FLUX.1")
    for gpu in TYPICAL:
        chosen, expected = plan(known, gpu, LINUX).chosen, fit_to(counted, gpu).choice.chosen
        assert chosen is not None and expected is not None
        assert chosen.seconds == pytest.approx(expected.seconds, rel=2e-3)
        assert chosen.device_bytes == pytest.approx(expected.device_bytes, abs=4 * 2**20)
        assert (chosen.weight_format, chosen.complexity) == (expected.weight_format, expected.complexity)


@pytest.mark.parametrize(
    ("card", "system", "is_fused"),
    [("RTX 4090", LINUX, True), ("RTX 4090", WINDOWS, False), ("RTX 2080 Ti", LINUX, False), ("T4", WINDOWS, False)],
)
def test_operations_are_counted_as_the_system_and_the_card_run_them(card: str, system: str, is_fused: bool) -> None:
    (klein,) = (known for known in load_models() if known.title == "FLUX.2 klein 4B")
    (gpu,) = parse_cards(card)
    gpu = replace(gpu, memory_bytes=80 << 30)
    chosen = plan(klein, gpu, system).chosen
    modes = klein.modes if is_fused else klein.unfused_modes
    assert chosen is not None and chosen.device_bytes in {
        (item.resident_mib[0] + mode.other_mib[item.name]) << 20 for item in klein.formats for mode in modes
    }
    assert klein.unfused_modes[0].other_mib["bf16"] > 1.2 * klein.modes[0].other_mib["bf16"]


def test_models_without_fused_operations_have_one_count() -> None:
    assert {known.title for known in load_models() if not known.unfused_modes} >= {"SDXL", "SD 1.5"}


def test_the_system_is_windows_only_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_system() == LINUX
    monkeypatch.setattr("platform.system", lambda: "Windows")
    for found, system in ((None, WINDOWS), (object(), LINUX)):
        monkeypatch.setattr(gpus, "find_spec", lambda name, found=found: found)
        assert find_system() == system


@pytest.mark.slow
def test_the_guidance_loss_costs_less_than_half_a_step_at_full_size() -> None:
    """1.5 times a plain step, 1.34 times a recomputed one, at most."""
    lines = list(longer_lines("FLUX.1", ["--guidance_loss", "3"], gpus_of(["24GB"])))
    for line, most in zip(lines, (1.5, 1.34), strict=True):
        assert 1.2 < float(line.split()[-2]) <= most, line


def test_the_table_of_the_page_has_every_model() -> None:
    assert {model.title for model in load_models()} == FULL_SIZE.keys()
    page = PAGE.read_text(encoding="utf-8")
    assert page == put_into(page, "plan_models", list(table(load_models(), gpus_of(CARDS))))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("3060 12gb", ["RTX 3060"]), ("RTX 3060", ["RTX 3060"] * 2), ("4070 Ti Super", ["RTX 4070 Ti SUPER"]),
        ("7900 XTX", ["RX 7900 XTX"]), ("m3 max 64GB", ["M3 Max"]), ("16GB", ["RTX 4060 Ti"]), ("4090", ["RTX 4090"]),
        ("24", ["RTX 3090"]), ("a100 80GB", ["A100"]),
    ],
)  # fmt: skip
def test_gpus_are_found_as_people_write_them(text: str, names: list[str]) -> None:
    assert [gpu.name for gpu in parse_cards(text)] == names


def test_the_timings_of_the_first_day_fit_their_budget() -> None:
    """As counted, with the context of CUDA, which the budget excludes."""
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    (line,) = (line for line in page.splitlines() if "gpu_step --models flux" in line)
    words = shlex.split(line)
    budget = float(words[words.index("--budget") + 1]) * 1e9
    end = next(i for i, word in enumerate(words) if i > words.index("--modes") + 1 and word.startswith("--"))
    (flux,) = (known for known in load_models() if known.title == "FLUX.1")
    (recomputed,) = (mode for mode in flux.modes if mode.options == "--gradient_checkpointing")
    resident = {item.name: item.resident_mib[0] for item in flux.formats}
    for name in words[words.index("--modes") + 1 : end]:
        weights = STEP_MODES[name].weight_format.replace("none", "bf16")
        assert (resident[weights] + recomputed.other_mib[weights]) * 2**20 <= budget, name


def test_the_first_day_is_in_its_order() -> None:
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    (section,) = (part for part in page.split("\n## ") if part.startswith("First day"))
    steps = ["Compiler", "Build", "-m gpu", "One recomputed step", "Verify", "Reserved against allocated", "Timings",
             "--profile 10", "Planned against measured"]  # fmt: skip
    places = [section.index(step) for step in steps]
    assert places == sorted(places)
