"""Runs that train nothing or plan first: --dry_run, --audit_only, --fit, and early checks."""

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from PIL import Image
from safetensors import safe_open
from schedulefree import AdamWScheduleFree
from torch import Tensor

from library.checkpoints.weights import Weights
from library.commands.counted_plan import count
from library.data.caching import latents
from library.data.sources.folders import image_index
from library.memory.planner.gpus import TYPICAL
from library.memory.planner.prediction import MemoryMode, predict
from library.training.command_line import audit_only as module
from library.training.loop import loop
from library.training.planning import correction, counting
from library.training.planning.correction import Gauge
from library.training.report_page.page import read_data
from library.training.reporting.events import Event
from tests.running import ROOT, SCRIPTS, Finished, make_images
from tests.tiny.bases import BASES

Train = Callable[..., Finished]


def files_below(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("options", [[], ["--cache_latents_to_disk"]], ids=["plain", "cached"])
def test_a_dry_run_reports_its_requirements_and_writes_nothing(
    train: Train, base_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    """Images of 96x64 form the largest bucket; a real run would index folders of any size."""
    monkeypatch.setattr(image_index, "MIN_FILES", 1)
    make_images(tmp_path / "data" / "1_small", 3, side=64)
    make_images(tmp_path / "data" / "1_large", 2, side=128)
    before = files_below(tmp_path)
    encoded: list[int] = []
    honest = latents.encode_batch
    monkeypatch.setattr(latents, "encode_batch", lambda jobs, *rest: encoded.append(len(jobs)) or honest(jobs, *rest))
    buckets = ["--enable_bucket", "--bucket_no_upscale", "--min_bucket_reso", "64", "--resolution", "128"]
    logs = ["--logging_dir", str(tmp_path / "logs")]
    done = train([*base_arguments, *buckets, *logs, *options, "--dry_run", "--max_train_steps", "50"]).ok()
    assert files_below(tmp_path) == before
    assert "the largest batch has 2 images of 128x128" in done.stderr
    assert "27904 parameters are trained" in done.stderr
    assert "dry run: 50 steps in " in done.stderr and "memory of a step: peak" in done.stderr
    assert sum(encoded) == (2 if options else 0)


def test_a_resolution_far_from_the_base_models_own_is_warned_of(train: Train, base_arguments: list[str]) -> None:
    for side, is_far in ((64, False), (24, True)):  # the tiny model's folder states 64
        done = train([*base_arguments, "--resolution", str(side), "--debug_dataset"]).ok()
        line = f"resolution is {side}x{side}, but this base model is trained at 512x512"
        assert (line in done.stderr) == is_far


ROUNDED = ["--mixed_precision", "bf16", "--full_bf16", "--stochastic_rounding"]


def test_a_dry_run_rounds_and_swaps_the_weights_like_a_real_run(
    train: Train, base_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare the dtypes that a schedule-free optimizer sees in its step and in evaluation mode."""
    met: list[tuple[str, torch.dtype]] = []
    for name in ("step", "eval"):
        honest = getattr(AdamWScheduleFree, name)

        def noting(optimizer: Any, *given: Any, name: str = name, honest: Any = honest) -> Any:
            met.append((name, optimizer.param_groups[0]["params"][0].dtype))
            return honest(optimizer, *given)

        monkeypatch.setattr(AdamWScheduleFree, name, noting)
    words = [*base_arguments, *ROUNDED, "--optimizer_type", "AdamWScheduleFree"]
    for more in (["--dry_run"], ["--max_train_steps", "1"]):
        met.clear()
        train([*words, *more]).ok()
        assert met[:2] == [("step", torch.float32), ("eval", torch.float32)]
        # The size of the change is measured in evaluation mode too.
        assert set(met[2:]) <= {("eval", torch.float32)}
    assert (tmp_path / "out" / "mine.safetensors").is_file()


def test_a_dry_run_finds_mistakes(train: Train, base_arguments: list[str]) -> None:
    done = train([*base_arguments, "--dry_run", "--network_args", "conv_din=4"])
    assert done.status == 1 and "conv_dim" in done.stderr


def test_running_out_of_memory_in_a_step_is_explained(
    train: Train, base_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = loop.loss_of

    def loss_of(run: Any, batch: Any, batch_number: int) -> Any:
        if batch_number == 2:
            torch.empty(1 << 60, dtype=torch.uint8)
        return honest(run, batch, batch_number)

    monkeypatch.setattr(loop, "loss_of", loss_of)
    done = train(base_arguments)
    assert done.status == 1 and "Traceback" not in done.stderr
    assert "out of memory while computing step 3, forward and backward, 2 images of 64x64" in done.stderr
    assert "memory: peak" in done.stderr and "--gradient_checkpointing" in done.stderr


def test_running_out_of_memory_while_caching_is_explained(
    train: Train, base_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode_batch(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    monkeypatch.setattr(latents, "encode_batch", encode_batch)
    done = train([*base_arguments, "--cache_latents", "--vae_batch_size", "2"])
    assert done.status == 1 and "Traceback" not in done.stderr
    assert "out of memory while loading the models and caching" in done.stderr
    assert "--vae_batch_size 1" in done.stderr


# --audit_only inspects every image without loading a base model.


@pytest.mark.parametrize("script", ["train_network", "flux_train_network"])
def test_findings_are_logged_and_shown_in_the_report(
    train: Train, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script in SCRIPTS
    folder = make_images(tmp_path / "data" / "1_<b>thing", 4, side=96, seed=12)
    Image.new("RGB", (96, 96), (9, 90, 9)).save(folder / "green.png")
    with Image.open(folder / "01.png") as image:
        image.resize((80, 80)).save(folder / "copy.jpg", quality=60)
    logged: list[Event] = []
    monkeypatch.setattr(
        module, "collect_events", lambda events, make=module.collect_events: logged.extend(events) or make(events)
    )
    arguments = ["--train_data_dir", str(tmp_path / "data"), "--resolution", "64", "--caption_extension", ".txt"]
    done = train([*arguments, "--audit_only", "--output_dir", str(tmp_path / "out"), "--output_name", "cat"], script)
    assert done.status == 0, done.stderr
    assert "1 image of a single colour" in done.stderr
    assert "2 images near-duplicated" in done.stderr and "copy.jpg (group 1)" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cat-audit.html"]
    page = (tmp_path / "out" / "cat-audit.html").read_text(encoding="utf-8")
    findings = read_data(page)["findings"]
    assert [finding["num_pictures"] for finding in findings][:2] == [1, 2]
    assert all(
        p["thumbnail"].startswith("data:image/webp;base64,") for finding in findings for p in finding["pictures"]
    )
    schema = Draft202012Validator(json.loads((ROOT / "docs" / "events.schema.json").read_text(encoding="utf-8")))
    for event in logged:
        schema.validate(json.loads(json.dumps(module.plain(event.as_line(1.0)))))


def test_file_formats_crops_and_all_warnings_are_on_the_page(train: Train, tmp_path: Path) -> None:
    folder, rng = make_images(tmp_path / "data" / "1_cat", 3, side=96, seed=13), random.Random(14)

    def noise(mode: str, size: tuple[int, int]) -> Image.Image:
        return Image.frombytes(mode, size, rng.randbytes(size[0] * size[1] * len(mode)))

    noise("CMYK", (96, 96)).save(folder / "print.jpg")
    noise("RGBA", (96, 96)).save(folder / "logo.png")
    first, *rest = [noise("RGB", (96, 96)).quantize() for _ in range(3)]
    first.save(folder / "dance.webp", save_all=True, append_images=rest)
    noise("RGB", (400, 64)).save(folder / "wide.png")
    (folder / "scan.tiff").write_bytes(b"x")
    out = tmp_path / "out"
    config = tmp_path / "data.toml"
    subset = f"[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\ncaption_extension = '.txt'\n"
    config.write_text("".join(f"[[datasets]]\nresolution = {side}\n{subset}" for side in (64, 96)))
    done = train(["--dataset_config", str(config), "--audit_only", "--output_dir", str(out), "--output_name", "cat"])
    assert done.status == 0, done.stderr
    data = read_data((out / "cat-audit.html").read_text(encoding="utf-8"))
    findings = {finding["text"].partition(" ")[2][:24]: finding["pictures"] for finding in data["findings"]}
    file_names = {text: [Path(image["file"]).name for image in images] for text, images in findings.items()}
    assert file_names["image animated; only the"] == ["dance.webp"]
    assert file_names["image partly transparent"] == ["logo.png"] and file_names["image in CMYK, whose col"] == [
        "print.jpg"
    ]
    assert file_names["image of which a third o"] == ["wide.png"]
    warnings = [finding["text"] for finding in data["warnings"]]
    assert any("unsupported extensions" in text and text.endswith("scan.tiff") for text in warnings)
    assert sum("without a caption file" in text for text in warnings) == 1, "said once for both sizes"
    masked = config.read_text().replace("caption_extension", "alpha_mask = true\ncaption_extension")
    config.write_text(masked)
    assert "partly transparent" not in train(["--dataset_config", str(config), "--audit_only"]).stderr


def test_nothing_is_written_without_an_output_path_and_good_images_are_reported_as_fine(
    train: Train, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "inspect", lambda *samples, has_alpha: [])
    before = sorted(images.rglob("*"))
    done = train(["--train_data_dir", str(images), "--resolution", "64", "--caption_extension", ".txt", "--audit_only"])
    assert done.status == 0 and "no problems found in the images" in done.stderr
    assert sorted(images.rglob("*")) == before


def test_options_that_a_dataset_file_overrides_are_warned_of(train: Train, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 2)
    file = tmp_path / "data.toml"
    file.write_text(
        f"[[datasets]]\nresolution = 64\nbatch_size = 4\n[[datasets.subsets]]\nimage_dir = '{images.as_posix()}'\n"
    )
    done = train(
        ["--dataset_config", str(file), "--resolution", "128", "--train_batch_size", "2", "--audit_only"],
        "train_network",
    ).ok()
    assert f"--resolution 128 has no effect: {file} sets resolution = 64; change it there" in done.stderr
    assert f"--train_batch_size 2 has no effect: {file} sets batch_size = 4; change it there" in done.stderr


def test_an_option_typed_with_its_default_is_warned_of_too(train: Train, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", 2)
    text = "[[datasets]]\nresolution = 64\nbatch_size = 4\n[[datasets.subsets]]\n"
    (tmp_path / "data.toml").write_text(f"{text}image_dir = '{images.as_posix()}'\n")
    words = ["--dataset_config", str(tmp_path / "data.toml"), "--audit_only"]
    line = f"--train_batch_size 1 has no effect: {tmp_path / 'data.toml'} sets batch_size = 4; change it there"
    for typed in (["--train_batch_size", "1"], ["--train_batch_size=1"]):
        assert train([*words, *typed], "train_network").stderr.count(line) == 1
    assert "has no effect" not in train(words, "train_network").stderr
    (tmp_path / "data.toml").write_text("datasets = 3")
    assert "must be an array of tables" in train([*words, "--train_batch_size", "1"], "train_network").stderr


# Errors that would end a run later are found before anything is read or encoded.

TYPOS = [
    (["--network_args", "conv_dimm=4"], "conv_dimm"),
    (["--network_args", "block_dims=4,4"], "block_dims"),
    (["--network_module", "networks.lorra"], "did you mean networks.lora?"),
    (["--network_module", "lycoriss.kohya"], "lycoriss"),
    (["--optimizer_type", "AdamWW"], "AdamWW"),
    (["--optimizer_args", "betass=0.9,0.99"], "betass"),
    (["--lr_scheduler", "cosin"], "cosin"),
    (["--lr_scheduler_type", "StepLR", "--lr_scheduler_args", "step_sizes=2"], "step_sizes"),
    (["--learning_rate", "0"], "nothing would be trained"),
]


@pytest.mark.parametrize(("words", "named"), TYPOS, ids=lambda value: str(value))
def test_a_typo_ends_the_run_before_caching(
    train: Train, base_arguments: list[str], images: Path, words: list[str], named: str
) -> None:
    done = train([*base_arguments, "--cache_latents_to_disk", *words])
    assert done.status == 1 and named in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(images.rglob("*.npz"))


def test_a_misspelled_network_module_is_named_before_model_and_images_are_opened(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "none").touch()
    (tmp_path / "neither").mkdir()
    words = ["--pretrained_model_name_or_path", str(tmp_path / "none"), "--train_data_dir", str(tmp_path / "neither")]
    done = train([*base_arguments, *words, "--network_module", "networks.lroa"])
    assert done.status == 1
    assert "--network_module networks.lroa: there is no such module; did you mean networks.lora?" in done.stderr


@pytest.mark.parametrize("base", BASES)
def test_the_adapter_of_every_base_model_is_rehearsed_without_reading_weights(
    train: Train, tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(tmp_path / "data" / "1_a", 2, seed=71)
    model = BASES[base].build(tmp_path / "model")
    command = [
        *model, "--train_data_dir", str(tmp_path / "data"), "--caption_extension", ".txt", "--resolution", "64",
        "--output_dir", str(tmp_path / "out"), "--network_module", BASES[base].module, "--network_dim", "4",
        "--max_train_steps", "1", "--max_data_loader_n_workers", "0",
    ]  # fmt: skip
    created: list[Weights] = []
    honest = Weights.__init__

    def watched(weights: Weights, origin: str, shapes: object, read: Callable[[str], Tensor], **more: object) -> None:
        def without_memory(name: str) -> Tensor:
            tensor = read(name)
            assert tensor.is_meta, f"{name} of {origin} was read"
            return tensor

        honest(weights, origin, shapes, without_memory, **more)  # type: ignore[arg-type]
        created.append(weights)

    monkeypatch.setattr(Weights, "__init__", watched)
    assert BASES[base].script in SCRIPTS
    done = train([*command, "--network_args", "no_such_argument=1"], script=BASES[base].script)
    assert done.status == 1 and "no_such_argument" in done.stderr and created, done.stderr
    assert "was read" not in done.stderr


# --fit configures the run as the planner chose and reports the choice.

MIB = 2**20


def flux_arguments(tmp_path: Path, *more: str) -> list[str]:
    base = BASES["flux"]
    make_images(tmp_path / "data" / "1_thing", 4, side=256)
    return [
        *base.build(tmp_path / "model"), "--network_module", base.module, "--network_dim", "4", "--train_data_dir",
        str(tmp_path / "data"), "--caption_extension", ".txt", "--resolution", "256", "--output_dir",
        str(tmp_path / "out"), "--output_name", "mine", "--max_train_steps", "3", "--learning_rate", "1e-3", "--seed",
        "6", "--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only",
        "--max_data_loader_n_workers", "0", *more,
    ]  # fmt: skip


def budget_between(arguments: Sequence[str], more: MemoryMode, less: MemoryMode, spare: int = 512) -> str:
    """Return a budget that the first configuration exceeds and the second fits into, with `spare` MB left free."""
    _, counted = count("flux_train_network", arguments)
    needs = [predict(counted.step, mode, TYPICAL[0]).device_bytes for mode in (more, less)]
    assert needs[0] > needs[1]
    return f"{sum(needs) / 2 / MIB + spare:.3f}MB"


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.nightly
def test_with_a_large_budget_activations_are_kept(train: Train, tmp_path: Path) -> None:
    command = ["--log_events", str(tmp_path / "events.jsonl"), "--no_report"]
    done = train(flux_arguments(tmp_path, "--fit", "12GB", *command), script="flux_train_network").ok()
    assert "11.2 GiB free of 12 GB (counted as this processor" in done.stderr
    assert "selected: ->. To pin this choice, add: --vae_batch_size 8 --text_encoder_batch_size 8" in done.stderr
    assert metadata_of(tmp_path / "out" / "mine.safetensors")["ss_gradient_checkpointing"] == "False"
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (planned,) = (line["planned"] for line in lines if line["event"] == "plan")
    assert 0 < planned["tensor_bytes"] < planned["card_bytes"] < 12 * 1024 * MIB and planned["seconds"] > 0


@pytest.mark.nightly
def test_with_a_small_budget_activations_are_recomputed(train: Train, tmp_path: Path) -> None:
    arguments = flux_arguments(tmp_path, "--blocks_to_swap", "0")
    room = budget_between(arguments, MemoryMode(recompute_every=2), MemoryMode(recompute_every=1))
    done = train([*arguments, "--fit", room], script="flux_train_network").ok()
    assert re.search(r"add: --gradient_checkpointing(?! --gradient_checkpointing_every)", done.stderr)
    assert metadata_of(tmp_path / "out" / "mine.safetensors")["ss_gradient_checkpointing"] == "True"


@pytest.mark.nightly
def test_weight_formats_are_chosen_from_the_allowed_ones(train: Train, tmp_path: Path) -> None:
    """A model with two blocks of each kind cannot swap any; 32-bit weights need more memory than 8-bit ones."""
    arguments = flux_arguments(tmp_path)
    room = (
        f"{float(budget_between(arguments, MemoryMode(None, 1, True), MemoryMode('int8', 1, True))[:-2]) - 512:.3f}MB"
    )
    done = train([*arguments, "--fit", room, "--fit_formats", "int8"], script="flux_train_network").ok()
    assert re.search(r"denoiser: \d+ layers in int8", done.stderr)
    refused = train([*arguments, "--fit", room], script="flux_train_network")
    assert refused.status == 1
    assert "nothing fits: the least is 0.7 GiB with --gradient_checkpointing" in refused.stderr


@pytest.mark.nightly
@pytest.mark.parametrize("name", BASES)
def test_every_base_model_can_be_fitted(name: str, train: Train, tmp_path: Path) -> None:
    base = BASES[name]
    make_images(tmp_path / "data" / "1_thing", 2)
    arguments = [
        *base.build(tmp_path / "model"), "--network_module", base.module, "--network_dim", "4", "--train_data_dir",
        str(tmp_path / "data"), "--caption_extension", ".txt", "--resolution", "64", "--output_dir",
        str(tmp_path / "out"), "--max_train_steps", "1", "--fit", "12GB", "--fit_formats", "int8", "--blocks_to_swap",
        "0", "--gradient_checkpointing",
    ]  # fmt: skip
    done = train(arguments, script=base.script).ok()
    assert re.search(r"-> +--base_format int8 --gradient_checkpointing ", done.stderr)
    assert re.search(r"denoiser: \d+ layers in int8", done.stderr)


def test_a_budget_that_is_too_small_ends_the_run_before_loading(train: Train, tmp_path: Path) -> None:
    done = train(flux_arguments(tmp_path, "--fit", "701MB"), script="flux_train_network")
    assert done.status == 1
    assert "--fit 701MB" in done.stderr
    assert re.search(r"nothing fits: the least is .* are frozen weights .* the adapter, its gradients", done.stderr)
    assert "Traceback" not in done.stderr and "caching" not in done.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("auto", "--fit auto measures the free memory of the GPU, and there is none"),
        ("lots", "'lots' is not a memory size"),
    ],
)
def test_impossible_budgets_are_named(size: str, message: str, train: Train, tmp_path: Path) -> None:
    done = train(flux_arguments(tmp_path, "--fit", size), script="flux_train_network")
    assert done.status == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("factor", "messages"),
    [
        pytest.param(1.02, ("memory of a step:",), marks=pytest.mark.nightly),
        (0.5, ("a step takes 50 % less memory than was planned", "switching to plain")),
        pytest.param(
            3.0,  # within the part of the GPU that a plan leaves free
            ("a step takes 200 % more memory than was planned", "keeping the configuration"),
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            3000.0,
            ("more memory than was planned", "makes it fit 1.2 GiB; where memory runs out, start again with smaller"),
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_the_first_steps_are_compared_with_the_plan_which_is_corrected_once(
    factor: float, messages: tuple[str, ...], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = flux_arguments(tmp_path, "--blocks_to_swap", "0")
    mode = MemoryMode(recompute_every=1)
    # Both plans are for this machine, where nothing is fused.
    monkeypatch.setattr(counting, "has_fused_kernels", lambda *_: False)
    _, counted = count("flux_train_network", arguments)
    room = budget_between(arguments, MemoryMode(recompute_every=2), mode)
    planned = predict(counted.step, mode, TYPICAL[0]).tensor_bytes
    measured = iter([int(factor * planned)])  # for the second step, the only one that is read
    resets: list[int] = []
    gauge = Gauge(lambda: next(measured), lambda: resets.append(1))
    monkeypatch.setattr(correction, "make_gauge", lambda device: gauge)
    done = train([*arguments, "--fit", room], script="flux_train_network").ok()
    for message in messages:
        assert message in done.stderr
    assert ("than was planned" in done.stderr) == (len(messages) == 2)
    assert done.stderr.count("memory of a step:") == 1
