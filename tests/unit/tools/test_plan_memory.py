"""tools/plan_memory.py and its table of models, from checkpoints that may lack their weights."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from benchmarks.gpu_step import STEP_MODES
from benchmarks.plan_models import CARDS, FORMATS, count_model, gpus_of, longer_lines, table, to_json
from benchmarks.plan_models import arguments_for as planned_arguments
from benchmarks.results_page import PAGE, put_into
from library.commands import counted_plan
from library.commands.counted_plan import count
from library.memory.devices import bytes_of
from library.memory.planner import fakes, gpus
from library.memory.planner.gpus import GIB, LINUX, TYPICAL, WINDOWS, find_system, parse_cards
from library.memory.planner.known import FILE, find_model, load_models, plan
from library.memory.planner.steps import compute_peak_bytes
from library.memory.planner.weights import StorageCost
from library.options.model import BASE_FLAG
from library.page.worker import describe_fit
from library.train_photos.base import recognise
from library.training.planning import counting
from library.training.planning.fit import fit_to
from tests.contracts.header_only import FULL_SIZE
from tests.running import ROOT
from tests.tiny.bases import BASES
from tests.unit.memory.planner.made_up import allocated_peak
from tools.plan_memory import main

pytestmark = pytest.mark.usefixtures("fresh_process")  # parsing options sets up logging

# Single blocks keep two parts less for the backward pass than in the counter below: bf16 values of all tokens.
LESS = {"FLUX.1": 38 * 2 * 4608 * 3072 * 2 / GIB, "HunyuanImage 2.1": 40 * 2 * 5224 * 3584 * 2 / GIB}
PROTOTYPE = {  # GiB at the peak and TFLOP of a first step without and with recomputing, from a counter of whole models
    "SD 1.5": (2.81, 1.90, 1.81, 2.46),
    "SDXL": (12.90, 5.69, 14.74, 20.87),
    "FLUX.1": (62.48 - LESS["FLUX.1"], 24.89, 172.2, 246.9),
    "Lumina Image 2.0": (27.50, 6.94, 55.5, 79.5),
    "Anima": (17.60, 5.05, 42.7, 60.8),
    "HunyuanImage 2.1": (88.75 - LESS["HunyuanImage 2.1"], 36.15, 279.4, 400.7),
}


def arguments_for(folder: Path, *more: str) -> list[str]:
    base = BASES["flux"]
    return [
        "--script", f"{base.script}.py", *base.build(folder), "--network_module", base.module, "--network_dim", "4",
        "--mixed_precision", "bf16", "--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only",
        *more,
    ]  # fmt: skip


def test_a_table_is_printed_for_each_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = arguments_for(tmp_path / "model", "--cards", "8GB,24GB", "--resolution", "256,192")
    assert main([*arguments, "--train_batch_size", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("flux, 3 x 256x192, networks.lora_flux\n")
    assert "7.2 GiB free of 8 GB (counted as RTX 4060" in printed
    assert "23.0 GiB free of 24 GB (counted as RTX 3090" in printed
    assert printed.count("encoding captions: 0.7 GiB with --text_encoder_batch_size 8") == 2
    assert printed.count("peak of the run: encoding images, 0.7 GiB") == 2


def test_usual_trainings_of_all_models_need_neither_a_file_nor_a_package() -> None:
    line = [sys.executable, "-S", "-E", str(ROOT / "tools" / "plan_memory.py"), "--cards"]
    done = subprocess.run([*line, "RTX 3060"], capture_output=True, text=True, check=True)
    assert "of 8 GB" in done.stdout and "of 12 GB" in done.stdout
    assert all(done.stdout.count(f"{title}, ") >= 2 for title in FULL_SIZE)
    for card, message in (
        ("GTX 660", "--cards: 'GTX 660' is not known; give its memory, such as 24GB"),
        ("M3 Max", "write M3 Max 64GB"),
    ):
        done = subprocess.run([*line, card], capture_output=True, text=True)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run([*line, "24GB", "--script", "train_network.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "lacks packages of this suite" in done.stderr


@pytest.mark.slow
def test_previews_are_planned_at_the_largest_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Decoding is counted as a separate pass of the VAE."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 128 --h 192\na dog --w 64 --h 64\n")
    arguments = arguments_for(tmp_path / "model", "--resolution", "64")
    previews = ["--sample_prompts", str(prompts), "--sample_every_n_steps", "5"]
    assert main(arguments) == 0 and "previews" not in capsys.readouterr().out
    assert main([*arguments, *previews]) == 0
    assert "previews of 128x192: 0.7 GiB\n" in capsys.readouterr().out
    run, counted = count("flux_train_network", [*arguments[2:], *previews])
    assert counted.preview is not None
    vae = run.arch.load.vae()
    latents_BCHW = torch.randn(1, 16, 192 // 8, 128 // 8)
    with torch.no_grad():
        real = allocated_peak(lambda: run.arch.codec.decode(vae, latents_BCHW))
    assert counted.preview.decoding_bytes == pytest.approx(real, rel=0.1)
    assert counted.preview.vae_bytes == bytes_of(vae)


@pytest.mark.slow
def test_the_dataset_determines_the_largest_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "data.toml"
    config.write_text(
        "[[datasets]]\nresolution = 256\nbatch_size = 1\n[[datasets.subsets]]\nimage_dir = 'nowhere'\n"
        "[[datasets]]\nresolution = [192, 128]\nbatch_size = 4\n[[datasets.subsets]]\nimage_dir = 'nowhere'\n"
    )
    assert main(arguments_for(tmp_path / "model", "--dataset_config", str(config))) == 0
    assert capsys.readouterr().out.startswith("flux, 4 x 192x128,")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--cards", "12TB", "--resolution", "64"), "--cards: '12TB' is not known; give its memory"),
        ((), "--resolution is not set"),
        (
            ("--resolution", "64", "--script", "flux.py"),
            "--script flux.py is not a training script; use one of train_net",
        ),
    ],
)
def test_invalid_values_raise_errors_that_name_them(
    more: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments_for(tmp_path / "model", *more)) == 1
    assert message in capsys.readouterr().err


def train_arguments(name: str, folder: Path) -> list[str]:
    """Return the options of a usual training of a full-size model, without the script."""
    model = FULL_SIZE[name]
    return [
        *model.build(folder / "model"), "--network_module", model.module, "--network_dim", "16",
        "--mixed_precision", "bf16", "--network_train_unet_only", "--cache_latents",
        "--resolution", str(model.side),
        *([] if model.script == "train_network" else ["--cache_text_encoder_outputs"]),
    ]  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("name", PROTOTYPE)
def test_full_size_models_match_the_counts_of_whole_models(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fakes, "fused_rms_norm", functional.rms_norm)  # PROTOTYPE counts six operations
    monkeypatch.setattr(counting, "has_fused_kernels", lambda *settings: False)  # and no fused operations
    monkeypatch.setattr(counted_plan, "NUM_TOKENS", 1 << 20)  # and the longest caption of the model
    counted = count(FULL_SIZE[name].script, train_arguments(name, tmp_path))[1]
    step = counted.step
    fixed = step.weights.resident_bytes(StorageCost.of(None), ()) + step.adapter_bytes
    timelines = [
        list(step.timeline.expand(recomputes, lambda i: True)) for recomputes in (lambda i: False, lambda i: True)
    ]
    actual = [(fixed + compute_peak_bytes(moves)) / GIB for moves in timelines]
    actual += [sum(move.segment.flops for move in moves) / 1e12 for moves in timelines]
    assert actual == pytest.approx(PROTOTYPE[name], rel=0.01)


KREA_2_BLOCK = ([6144] * 7 + [16384], [6144, 1536, 1536, 6144, 6144, 16384, 16384, 6144])  # (inputs, outputs) of layers
KREA_2_FUSION = ([2560] * 7 + [6912], [2560] * 5 + [6912] * 2 + [2560])
KREA_2_ENDS = ([64, 256, 6144, 6144, 2560, 6144, 6144, 12], [6144, 6144, 6144, 36864, 6144, 6144, 64, 1])
QWEN_BLOCK = ([4096] * 6 + [12288], [4096] * 4 + [12288] * 2 + [4096])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_parameters", "adapted", "width", "num_tokens"),
    [
        ("Krea 2", 12_820_073_036, [*[KREA_2_FUSION] * 4, KREA_2_ENDS, *[KREA_2_BLOCK] * 28], 6144, 4096 + 300),
        ("Qwen-Image 2.1", 7_115_124_736, [QWEN_BLOCK] * 32, 4096, 4096 + 300),
    ],
)
def test_full_size_models_match_counts_by_hand(
    name: str,
    num_parameters: int,
    adapted: list[tuple[list[int], list[int]]],
    width: int,
    num_tokens: int,
    tmp_path: Path,
) -> None:
    """Rank 16 at 1024 px with 300 tokens of text: factors and alphas in float32, and with recomputation each input of a
    block in bf16."""
    step = count(FULL_SIZE[name].script, train_arguments(name, tmp_path))[1].step
    assert step.weights.resident_bytes(StorageCost.of(None), ()) == 2 * num_parameters
    assert step.adapter_bytes == 4 * sum(16 * (sum(ins) + sum(outs)) + len(ins) for ins, outs in adapted)
    kept = [
        move.segment.delta
        for move in step.timeline.expand(lambda i: True, lambda i: True)
        if move.block_index is not None and not move.is_backward
    ]
    assert kept[-1] == 2 * num_tokens * width
    assert kept[-9:] == 9 * kept[-1:]


# The kept counts and the table of the page match what benchmarks/plan_models.py counts and plans.

# A model takes up to 6 CPU seconds. Those that are not listed are nightly.
SLOW = ("Anima", "FLUX.1")


def tier_of(title: str) -> pytest.MarkDecorator:
    return pytest.mark.slow if title in SLOW else pytest.mark.nightly


@pytest.mark.parametrize("title", [pytest.param(title, marks=tier_of(title)) for title in FULL_SIZE])
def test_the_kept_counts_are_those_of_the_planner(title: str) -> None:
    (kept,) = (entry for entry in json.loads(FILE.read_text(encoding="utf-8")) if entry["title"] == title)
    assert json.loads(to_json([count_model(title)])) == [kept]


@pytest.mark.slow
def test_a_plan_of_kept_counts_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    model = FULL_SIZE["FLUX.1"]
    _, counted = count(model.script, planned_arguments(model, tmp_path))
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


@pytest.mark.parametrize("title", FULL_SIZE)
def test_a_base_model_is_found_by_its_kind_and_number_of_values(title: str, tmp_path: Path) -> None:
    words = FULL_SIZE[title].build(tmp_path)
    base = recognise(words[words.index(BASE_FLAG) + 1])
    found = find_model(base.spec.name, base.num_values)
    assert found is not None and found.title == title
    for times in (0.5, 1.4):  # another model, or one in 4 bits; Anima's two are 1.4 times apart
        other = find_model(base.spec.name, int(times * base.num_values))
        assert other is None or other.title != title


@pytest.mark.parametrize(("gib", "ways"), [(80, []), (12, ["streamed"]), (4, ["recomputed", "streamed"]), (1, None)])
def test_the_page_says_how_a_base_model_fits(gib: int, ways: list[str] | None, tmp_path: Path) -> None:
    words = FULL_SIZE["SDXL"].build(tmp_path)
    (card,) = parse_cards("RTX 3060 12GB")
    gpu = replace(card, memory_bytes=gib << 30)
    fit = describe_fit(recognise(words[words.index(BASE_FLAG) + 1]), gpu)
    assert fit is not None and fit["ways"] == ways and (fit["bytes"] <= fit["gpu_bytes"]) == (ways is not None)
    assert describe_fit(recognise(str(ROOT / "configs" / "quickstart" / "toy_base")), gpu) is None


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
    """The counted memory, with the context of CUDA, which the budget excludes."""
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
