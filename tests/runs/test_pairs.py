"""Preferences and sliders from image pairs, and edits from references, on every base model."""

import re
from base64 import b64decode
from collections.abc import Callable
from io import BytesIO
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.checkpoints.files import load_state_dict
from library.training.evaluation.prompt_images import GAP
from library.training.report_page.page import read_data
from library.training.report_page.writer import read_report
from tests.running import SCRIPTS, Finished, load_saved, make_images, tiny_model
from tests.runs.test_report import events_of, of_kind
from tests.tiny.bases import BASES
from tests.tiny.flux import build_tiny_flux
from tests.tiny.flux_2 import build_tiny_flux_2
from tests.tiny.krea2 import build_tiny_krea2
from tests.tiny.moss_image import build_tiny_moss_image
from tools import choose_checkpoint, contact_sheet

Run = Callable[..., Finished]

DATASET = """
[general]
resolution = 64
caption_extension = ".txt"
batch_size = 2

[[datasets]]
[[datasets.subsets]]
image_dir = "{folder}/preferred"
opposite_dir = "{folder}/rejected"
"""
HELD_OUT = "validation_split = 0.34\n"
PREFERENCES, SLIDER = ("--preference_loss", "dpo"), ("--pair_slider", "0.7")
FAST = ("sd", "flux")
NAMES = [pytest.param(name, marks=() if name in FAST else pytest.mark.nightly) for name in BASES]


@pytest.fixture
def run(train: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return `run(base, folder, ...)`, which trains three steps on pairs with a base model."""
    make_images(tmp_path / "preferred", 6, seed=4)
    make_images(tmp_path / "rejected", 6, side=96, seed=5)
    write_dataset(tmp_path, HELD_OUT)
    models: dict[str, list[str]] = {}

    def start(name: str, folder: str, *more: str, status: int = 0) -> Finished:
        base = BASES[name]
        if name not in models:
            models[name] = base.build(tmp_path_factory.mktemp("model"))
        words = [
            *models[name], "--dataset_config", str(tmp_path / "data.toml"), "--output_dir", str(tmp_path / folder),
            "--output_name", "mine", "--network_module", base.module, "--network_dim", "4", "--learning_rate", "1e-2",
            "--max_train_steps", "3", "--seed", "5", "--max_data_loader_n_workers", "0", "--cache_latents",
            "--validate_at_first", "--validate_every_n_steps", "1", "--log_events", str(tmp_path / f"{folder}.jsonl"),
            *(() if "text" in folder else ("--network_train_unet_only",)), *more,
        ]  # fmt: skip
        done = train(words, script=base.script)
        assert done.status == status, done.stderr
        return done

    return start


def write_dataset(folder: Path, more: str) -> None:
    (folder / "data.toml").write_text(DATASET.replace("{folder}", folder.as_posix()) + more)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_state_dict(path / "mine.safetensors")


def are_equal(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_a_preference_run_starts_without_a_preference_and_resumes_bit_for_bit(
    run: Run, name: str, tmp_path: Path
) -> None:
    uninterrupted = run(name, "whole", *PREFERENCES, "--save_state", "--save_every_n_steps", "1")
    state = tmp_path / "whole" / "mine-step00000001-state"
    rest = run(name, "rest", *PREFERENCES, "--resume", str(state), "--gradient_checkpointing")
    assert len(uninterrupted.losses) == 3 and rest.losses == uninterrupted.losses[1:]
    assert are_equal(tmp_path / "whole", tmp_path / "rest")
    assert uninterrupted.losses[0] == 0.693, "the adapter changes nothing yet"

    validations = of_kind(events_of(tmp_path / "whole.jsonl"), "validation")
    assert validations[0]["loss"] == pytest.approx(log(2), rel=1e-6)
    assert validations[0]["preference"]["accuracy"] == 0.5 and abs(validations[0]["preference"]["margin"]) < 1e-6
    assert (
        all(abs(event["preference"]["margin"]) > 1e-3 for event in validations[1:])
        and validations[0]["num_pictures"] == 2
    )
    again = of_kind(events_of(tmp_path / "rest.jsonl"), "validation")
    assert [event["preference"] for event in again] == [event["preference"] for event in validations[2:]]
    report_items = read_report(tmp_path / "whole" / "mine-report.html").validations.items
    assert [item["preference"] for item in report_items] == [event["preference"] for event in validations]
    assert "preferred images ahead in 50.0%, mean margin" in uninterrupted.stderr
    assert (
        f"one partner in {(tmp_path / 'rejected').as_posix()} for each image, resized to the size"
        in uninterrupted.stderr
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_slider_from_pairs_resumes_bit_for_bit(run: Run, name: str, tmp_path: Path) -> None:
    uninterrupted = run(name, "whole", *SLIDER, "--save_state", "--save_every_n_steps", "1")
    state = tmp_path / "whole" / "mine-step00000001-state"
    rest = run(name, "rest", *SLIDER, "--resume", str(state), "--gradient_checkpointing")
    assert len(uninterrupted.losses) == 3 and rest.losses == uninterrupted.losses[1:]
    assert are_equal(tmp_path / "whole", tmp_path / "rest")
    run(name, "other", "--pair_slider", "0.3")
    assert not are_equal(tmp_path / "whole", tmp_path / "other")
    assert all(event["preference"] is None for event in of_kind(events_of(tmp_path / "whole.jsonl"), "validation"))


PROBE = """
[[datasets.subsets]]
image_dir = "{folder}/probe"
control_dirs = ["{folder}/before"]
control_resolution = 96
is_forgetting_probe = true
"""


def test_references_of_a_forgetting_probe_are_not_taken_for_partners(run: Run, tmp_path: Path) -> None:
    """An untrained adapter measures the same loss with pairs as without."""
    for folder, side in (("probe", 64), ("before", 96)):
        make_images(tmp_path / folder, 2, side=side, seed=side)
    write_dataset(tmp_path, PROBE.replace("{folder}", tmp_path.as_posix()))
    run("flux", "pairs", *PREFERENCES, "--max_train_steps", "1")
    text = (tmp_path / "data.toml").read_text()
    (tmp_path / "data.toml").write_text(text.replace(f'opposite_dir = "{tmp_path.as_posix()}/rejected"', ""))
    run("flux", "plain", "--max_train_steps", "1")
    pairs, plain = (of_kind(events_of(tmp_path / f"{name}.jsonl"), "forgetting")[0] for name in ("pairs", "plain"))
    assert pairs["loss"] == plain["loss"]


@pytest.mark.nightly
def test_a_partner_is_not_seen_by_a_text_encoder_that_sees_references(run: Run, tmp_path: Path) -> None:
    """Cached outputs of the text encoder train as those of the caption alone, encoded in every step."""
    for folder, caching in (("plain", ()), ("cached", ("--cache_text_encoder_outputs",))):
        run("qwen_image_21", folder, *PREFERENCES, *caching)
    assert are_equal(tmp_path / "plain", tmp_path / "cached")


def test_text_encoders_train_on_preferences_and_checkpoints_are_compared(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], tiny_sd_folder: Path
) -> None:
    """The reference model uses text encoders without the adapter."""
    done = run("sd", "text", *PREFERENCES, "--save_every_n_steps", "1", "--gradient_accumulation_steps", "2")
    assert done.losses[0] == 0.693  # log 2, rounded as in the progress bar
    assert any(
        key.startswith("lora_te_") and float(tensor.abs().max()) > 0
        for key, tensor in weights(tmp_path / "text").items()
        if "lora_up" in key
    )
    words = [
        "--script", "train_network.py", "--pretrained_model_name_or_path", str(tiny_sd_folder), "--dataset_config",
        str(tmp_path / "data.toml"), "--output_dir", str(tmp_path / "text"), "--output_name", "mine", "--seed", "5",
        "--network_module", "networks.lora", *PREFERENCES,
    ]  # fmt: skip
    assert choose_checkpoint.main(words) == 0
    assert "0.69315" in capfd.readouterr().out, "the base model prefers neither"


@pytest.mark.nightly
@pytest.mark.parametrize("words", [PREFERENCES, SLIDER], ids=["preferences", "slider"])
def test_each_adapter_of_a_sweep_equals_its_separate_run(run: Run, words: tuple[str, str], tmp_path: Path) -> None:
    run("sd", "sweep", *words, "--sweep", "learning_rate=1e-2,2e-2")
    for rate in ("1e-2", "2e-2"):
        run("sd", rate, *words, "--learning_rate", rate)
        separate, other = weights(tmp_path / rate), load_state_dict(tmp_path / "sweep" / f"mine-lr{rate}.safetensors")
        assert separate.keys() == other.keys() and all(torch.equal(separate[key], other[key]) for key in separate)


@pytest.mark.nightly
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("words", [PREFERENCES, SLIDER], ids=["preferences", "slider"])
def test_plan_dry_run_and_selftest_work(run: Run, name: str, words: tuple[str, str]) -> None:
    done = run(name, "fit", *words, "--fit", "8GB", "--max_train_steps", "1")
    assert "matches your options" in done.stderr or "To pin this choice" in done.stderr
    assert "dry run: the largest batch has 2 images" in run(name, "dry", *words, "--dry_run").stderr
    run(name, "self", *words, "--selftest", "--gradient_checkpointing")
    run(name, "uncached", *words, "--max_train_steps", "1", "--sweep", "network_dim=2,4", "--dry_run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--preference_loss", "dpo", "--preference_beta", "0"), "--preference_beta is 0.0; use a number above 0"),
        (("--preference_loss", "dpo", "--pair_slider", "1"), "each trains pairs in its own way; leave one of them out"),
        ((), "has opposite_dir, whose pairs are trained with --preference_loss dpo or --pair_slider 1"),
    ],
    ids=["beta", "both", "neither"],
)
def test_invalid_options_are_named_before_loading(run: Run, words: tuple[str, ...], message: str) -> None:
    done = run("sd", "out", *words, status=1)
    assert message in done.stderr and "loading" not in done.stderr


# flux_train_network.py on pairs of an image and the reference it was edited from (FLUX.1 Kontext).

Train = Callable[..., Finished]


kontext_arguments = tiny_model("flux", 23)


@pytest.fixture
def arguments(kontext_arguments: list[str], tmp_path: Path) -> list[str]:
    """Return arguments for four training steps on six pairs."""
    make_images(tmp_path / "after", 6)
    make_images(tmp_path / "before", 6, side=96, seed=1)
    write_config(tmp_path, "")
    return [
        *kontext_arguments, "--dataset_config", str(tmp_path / "data.toml"), "--output_dir", str(tmp_path / "out"),
        "--output_name", "mine", "--network_module", "networks.lora_flux", "--network_dim", "4", "--learning_rate",
        "1e-3", "--max_train_steps", "4", "--seed", "5", "--max_data_loader_n_workers", "0",
        "--t5xxl_max_token_length", "32", "--model_prediction_type", "raw", "--guidance_scale", "1",
        "--network_train_unet_only",
    ]  # fmt: skip


def write_config(folder: Path, keys: str) -> None:
    (folder / "data.toml").write_text(
        f"""
[[datasets]]
resolution = 64
batch_size = 2
caption_extension = ".txt"
{keys}

[[datasets.subsets]]
image_dir = "{(folder / "after").as_posix()}"
control_dirs = ["{(folder / "before").as_posix()}"]
flip_aug = true
"""
    )


def are_equal_edits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(weight, b[key]) for key, weight in a.items())


@pytest.mark.parametrize("keys", ["", "control_resolution = [96, 48]"], ids=["size of the image", "own size"])
@pytest.mark.parametrize("cache", [[], ["--cache_latents_to_disk"]], ids=["encoded in the step", "cached on disk"])
def test_a_resumed_run_on_pairs_equals_the_uninterrupted_one(
    train: Train, arguments: list[str], tmp_path: Path, cache: list[str], keys: str
) -> None:
    write_config(tmp_path, keys)
    uninterrupted = [*arguments, *cache, "--save_every_n_steps", "2", "--save_state"]
    done = train(uninterrupted, "flux_train_network").ok()
    assert "1 reference image for each image" in done.stderr
    state = str(tmp_path / "out" / "mine-step00000002-state")
    done = train([*uninterrupted, "--output_name", "resumed", "--resume", state], "flux_train_network").ok()
    assert "dataset is not the one of the state" not in done.stderr
    assert are_equal_edits(load_saved(tmp_path), load_saved(tmp_path, "resumed"))


def test_the_adapter_depends_on_the_references(train: Train, arguments: list[str], tmp_path: Path) -> None:
    assert train(arguments, "flux_train_network").status == 0
    make_images(tmp_path / "others", 6, side=96, seed=2)
    text = (tmp_path / "data.toml").read_text()
    (tmp_path / "data.toml").write_text(text.replace("/before", "/others"))
    assert train([*arguments, "--output_name", "other"], "flux_train_network").status == 0
    first, other = load_saved(tmp_path), load_saved(tmp_path, "other")
    assert first.keys() == other.keys() and not are_equal_edits(first, other)
    assert all(weight.isfinite().all() for weight in first.values())


def test_held_out_pairs_are_validated_and_batches_of_mixed_sizes_accumulate(
    train: Train, arguments: list[str], tmp_path: Path
) -> None:
    write_config(tmp_path, "validation_split = 0.34\ncontrol_no_resize = true")
    make_images(tmp_path / "wide", 1, side=128, seed=3)
    (tmp_path / "wide" / "00.png").rename(tmp_path / "before" / "00.png")
    extra = ["--gradient_accumulation_steps", "2", "--gradient_checkpointing", "--save_every_n_epochs", "1"]
    done = train([*arguments, *extra], "flux_train_network").ok()
    assert "2 of 6 images are held out for validation" in done.stderr and "validation" in done.stdout + done.stderr


def test_models_without_reference_support_are_rejected_before_loading(
    train: Train, arguments: list[str], tiny_sd_folder: Path, tmp_path: Path
) -> None:
    common = arguments[8 : arguments.index("--t5xxl_max_token_length")]
    done = train(["--pretrained_model_name_or_path", str(tiny_sd_folder), *common])
    assert done.status == 1
    assert "has 1 reference image for each image" in done.stderr and "this base model takes none" in done.stderr
    schnell = build_tiny_flux(tmp_path / "schnell", seed=22, has_guidance=False)
    done = train([*schnell, *arguments[8:]], "flux_train_network")
    assert done.status == 1 and "this base model takes none" in done.stderr


def test_batches_are_shown_with_their_references(train: Train, arguments: list[str]) -> None:
    done = train([*arguments, "--debug_dataset"], "flux_train_network").ok()
    assert "3 x pixels (2, 3, 64, 64), reference 0 pixels (2, 3, 64, 64)" in done.stderr
    assert re.search(r"after/00.png <- \S*before/00.png: ", done.stderr)


def test_the_audit_and_the_report_show_pairs_side_by_side(train: Train, arguments: list[str], tmp_path: Path) -> None:
    train([*arguments, "--audit_only"], "flux_train_network").ok()
    assert train(arguments, "flux_train_network").status == 0
    for name in ("mine-audit.html", "mine-report.html"):
        pairs = read_data((tmp_path / "out" / name).read_text(encoding="utf-8"))["audit"]["pairs"]
        assert [Path(pair["file"]).name for pair in pairs] == [f"{i:02}.png" for i in range(6)]
        with Image.open(BytesIO(b64decode(pairs[0]["thumbnail"].partition(",")[2]))) as thumbnail:
            assert thumbnail.size == (64 + GAP + 64, 64)
            right = np.asarray(thumbnail)[:, 64 + GAP :].astype(int)
        with Image.open(tmp_path / "after" / "00.png") as image:
            assert abs(right - np.asarray(image).astype(int)).mean() < 10


def test_previews_and_contact_sheets_show_the_reference_next_to_the_image(
    train: Train, arguments: list[str], tmp_path: Path
) -> None:
    make_images(tmp_path / "wide", 1, side=96, seed=7)
    before = tmp_path / "wide" / "00.png"
    Image.open(before).resize((96, 48)).save(before)
    (tmp_path / "prompts.txt").write_text(
        f"a red cat --ci {before} --w 64 --h 64 --s 2 --d 1\na red cat --w 64 --h 64 --s 2 --d 1\n"
    )
    extra = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "4", "--cache_latents"]
    done = train([*arguments, *extra], "flux_train_network").ok()
    assert "failed" not in done.stderr
    sizes = [Image.open(path).size for path in sorted((tmp_path / "out" / "sample").glob("*.png"))]
    beside = round(80 * 64 / 48)  # a 2:1 reference falls into the 80 x 48 bucket and is shown at the image's height
    assert sizes == [(beside + GAP + 64, 64), (64, 64)]
    words = [*arguments, "--sample_prompts", str(tmp_path / "prompts.txt"), "--side", "200"]
    assert contact_sheet.main(["--script", "flux_train_network.py", *words]) == 0
    with Image.open(tmp_path / "out" / "mine-sheet.png") as sheet:
        assert sheet.width > 2 * (beside + 64)


def test_a_preview_depends_on_its_reference(train: Train, arguments: list[str], tmp_path: Path) -> None:
    make_images(tmp_path / "refs", 2, seed=7)
    lines = [f"a red cat --ci {tmp_path / 'refs' / f'{i:02}.png'} --w 64 --h 64 --s 2 --d 1\n" for i in (0, 1, 0)]
    (tmp_path / "prompts.txt").write_text("".join(lines))
    extra = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_at_first", "--max_train_steps", "1"]
    assert train([*arguments, *extra], "flux_train_network").status == 0
    first, second, third = (
        np.asarray(Image.open(path))[:, 64 + GAP :] for path in sorted((tmp_path / "out" / "sample").glob("*.png"))
    )
    assert (first == third).all() and (first != second).any()


@pytest.mark.parametrize(
    ("build", "script", "module", "more"),
    [
        (build_tiny_flux_2, "flux_2_train_network", "networks.lora_flux_2", ["--edit"]),
        (build_tiny_moss_image, "moss_image_train_network", "networks.lora", []),
        (build_tiny_krea2, "krea2_train_network", "networks.lora_krea2", ["--edit"]),
    ],
    ids=["flux_2", "moss_image", "krea2"],
)
def test_other_models_train_on_two_references_of_a_musubi_dataset(
    train: Train, tmp_path: Path, build: Callable[[Path, int], list[str]], script: str, module: str, more: list[str]
) -> None:
    """Cover numbered stems, references of other sizes, a preview with both, and a resumed run that equals the
    uninterrupted one."""
    make_images(tmp_path / "after", 4)
    for number, side in enumerate((96, 64)):
        references = make_images(tmp_path / f"before{number}", 4, side=side, seed=1 + number)
        for path in references.glob("*.png"):
            (tmp_path / "before").mkdir(exist_ok=True)
            path.rename(tmp_path / "before" / f"{path.stem}_{number}.png")
    (tmp_path / "data.toml").write_text(
        f"""
[general]
resolution = [64, 64]
caption_extension = ".txt"
batch_size = 2
caption_dropout_rate = 0.3

[[datasets]]
image_directory = "{(tmp_path / "after").as_posix()}"
control_directory = "{(tmp_path / "before").as_posix()}"
no_resize_control = true
"""
    )
    shown = " ".join(f"--ci {(tmp_path / 'before' / f'00_{number}.png').as_posix()}" for number in (0, 1))
    (tmp_path / "prompts.txt").write_text(f"make it red --w 64 --h 48 --s 2 --d 3 {shown}\n")
    uninterrupted = [
        *build(tmp_path / "model", 64), *more, "--dataset_config", str(tmp_path / "data.toml"), "--output_dir",
        str(tmp_path / "out"), "--output_name", "mine", "--network_module", module, "--network_dim",
        "4", "--learning_rate", "1e-3", "--max_train_steps", "4", "--seed", "5", "--max_data_loader_n_workers", "0",
        "--cache_latents_to_disk", "--cache_text_encoder_outputs", "--save_every_n_steps", "2", "--save_state",
        "--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "4",
    ]  # fmt: skip
    done = train(uninterrupted, script)
    assert done.status == 0 and "failed" not in done.stderr, done.stderr
    assert "2 reference images for each image" in done.stderr
    state = str(tmp_path / "out" / "mine-step00000002-state")
    assert train([*uninterrupted, "--output_name", "resumed", "--resume", state], script).status == 0
    assert are_equal_edits(load_saved(tmp_path), load_saved(tmp_path, "resumed"))
    (preview,) = (tmp_path / "out" / "sample").glob("mine*.png")
    with Image.open(preview) as image:
        assert image.width > 3 * 64  # both references are to the left


@pytest.mark.parametrize("script", [name for name, spec in SCRIPTS.items() if spec.latents.max_references])
def test_edit_refuses_a_data_set_without_references(train: Train, tmp_path: Path, script: str) -> None:
    """Every script that trains pairs takes the option of musubi-tuner's commands."""
    make_images(tmp_path / "data" / "1_thing", 2)
    words = ["--train_data_dir", str(tmp_path / "data"), "--resolution", "64", "--audit_only", "--caption_extension"]
    assert train([*words, ".txt"], script).status == 0
    done = train([*words, ".txt", "--edit"], script)
    assert done.status == 1 and "--edit trains on reference images, but no subset of the data set" in done.stderr
