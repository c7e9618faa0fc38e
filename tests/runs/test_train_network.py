"""train_network.py end to end on a tiny Stable Diffusion 1.x model."""

import gzip
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.training.reporting.step_times import IN_STEP
from tests.running import SCRIPTS, Finished, make_images

Train = Callable[..., Finished]


def load_saved(tmp_path: Path, name: str = "mine.safetensors") -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "out" / name)


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "out").iterdir())


def test_a_run_trains_every_adapter_and_saves_one_file(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    train(base_arguments).ok()
    weights = load_saved(tmp_path)
    ups = {name: w for name, w in weights.items() if name.endswith("lora_up.weight")}
    assert any(name.startswith("lora_te_") for name in ups) and any(name.startswith("lora_unet_") for name in ups)
    assert all(w.isfinite().all() and w.abs().max() > 0 for w in ups.values())
    assert files(tmp_path) == ["mine.safetensors"]


def test_a_run_is_reproducible_by_seed(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    train([*base_arguments, "--output_name", "a"])
    train([*base_arguments, "--output_name", "b", "--max_data_loader_n_workers", "2"])
    train([*base_arguments, "--output_name", "c", "--seed", "6"])
    a, b, c = (load_saved(tmp_path, f"{name}.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_checkpoints_are_saved_by_steps_and_epochs_and_old_ones_are_deleted(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    """Twelve samples in batches of two make six steps per epoch, for two epochs."""
    options = ["--max_train_epochs", "2", "--save_every_n_steps", "3", "--save_last_n_steps", "3"]
    train([*base_arguments, *options, "--save_every_n_epochs", "1"]).ok()
    assert files(tmp_path) == [
        "mine-000001.safetensors",
        "mine-step00000009.safetensors",
        "mine-step00000012.safetensors",
        "mine.safetensors",
    ]
    with safe_open(tmp_path / "out" / "mine-step00000009.safetensors", "pt") as file:
        assert (file.metadata()["ss_steps"], file.metadata()["ss_epoch"]) == ("9", "2")
    with safe_open(tmp_path / "out" / "mine-000001.safetensors", "pt") as file:
        assert (file.metadata()["ss_steps"], file.metadata()["ss_epoch"]) == ("6", "1")


@pytest.mark.parametrize(("option", "prefix"), [("unet", "lora_unet_"), ("text_encoder", "lora_te_")])
def test_only_the_unet_or_only_the_text_encoder_trains(
    train: Train, base_arguments: list[str], tmp_path: Path, option: str, prefix: str
) -> None:
    train([*base_arguments, f"--network_train_{option}_only"]).ok()
    assert all(name.startswith(prefix) for name in load_saved(tmp_path))


def test_the_text_encoder_uses_its_own_learning_rate(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    train([*base_arguments, "--text_encoder_lr", "0", "--unet_lr", "1e-3"])
    weights = load_saved(tmp_path)
    moved = {n for n, w in weights.items() if n.endswith("lora_up.weight") and w.abs().max() > 0}
    assert moved and all(name.startswith("lora_unet_") for name in moved)
    assert any(name.startswith("lora_te_") for name in weights)


def test_latents_cached_on_disk_are_reused_and_train_the_same(
    train: Train, base_arguments: list[str], images: Path, tmp_path: Path
) -> None:
    train([*base_arguments, "--output_name", "memory", "--cache_latents"])
    train([*base_arguments, "--output_name", "disk", "--cache_latents_to_disk"])
    cached = sorted((images / "2_thing").glob("*_0064x0064_sd.npz"))
    assert len(cached) == 6
    times = [path.stat().st_mtime_ns for path in cached]
    train([*base_arguments, "--output_name", "again", "--cache_latents_to_disk"]).ok()
    assert [path.stat().st_mtime_ns for path in cached] == times
    memory, disk, again = (load_saved(tmp_path, f"{name}.safetensors") for name in ("memory", "disk", "again"))
    for name, weight in memory.items():
        assert torch.equal(weight, disk[name]) and torch.equal(weight, again[name])


def test_training_continues_from_a_file_with_its_ranks(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    train([*base_arguments, "--network_dim", "3", "--network_alpha", "2", "--output_name", "first"])
    first = str(tmp_path / "out" / "first.safetensors")
    train([*base_arguments, "--network_weights", first, "--dim_from_weights"]).ok()
    weights = load_saved(tmp_path)
    assert {w.shape[0] for n, w in weights.items() if n.endswith("lora_down.weight")} == {3}
    assert {float(w) for n, w in weights.items() if n.endswith(".alpha")} == {2.0}


def test_the_error_for_weights_of_another_rank_suggests_a_fix(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    train([*base_arguments, "--network_dim", "3", "--output_name", "first"])
    done = train([*base_arguments, "--network_weights", str(tmp_path / "out" / "first.safetensors")])
    assert done.status == 1
    assert "--dim_from_weights" in done.stderr


def test_base_weights_are_merged_into_the_base_model_and_not_saved(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    train([*base_arguments, "--output_name", "first", "--learning_rate", "0.05", "--max_train_steps", "8"])
    first = str(tmp_path / "out" / "first.safetensors")
    plain = train([*base_arguments, "--output_name", "plain"])
    zero = train([*base_arguments, "--output_name", "zero", "--base_weights", first, "--base_weights_multiplier", "0"])
    merged = train([*base_arguments, "--output_name", "merged", "--base_weights", first]).ok()
    assert plain.losses == zero.losses
    assert plain.losses[0] != merged.losses[0]
    assert set(load_saved(tmp_path, "merged.safetensors")) == set(load_saved(tmp_path, "plain.safetensors"))


@pytest.mark.parametrize("options", [["--mixed_precision", "bf16"], ["--mixed_precision", "bf16", "--full_bf16"]])
def test_bf16_training_saves_finite_weights(
    train: Train, base_arguments: list[str], tmp_path: Path, options: list[str]
) -> None:
    train([*base_arguments, *options]).ok()
    expected = torch.bfloat16 if "--full_bf16" in options else torch.float32
    weights = [w for name, w in load_saved(tmp_path).items() if not name.endswith(".alpha")]
    assert {w.dtype for w in weights} == {expected}
    assert all(w.isfinite().all() for w in weights)


def test_the_file_has_the_requested_precision(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    train([*base_arguments, "--save_precision", "fp16"])
    assert {w.dtype for w in load_saved(tmp_path).values()} == {torch.float16}


@pytest.mark.parametrize("extension", ["ckpt", "pt"])
def test_pickle_files_contain_the_plain_state_dict(
    train: Train, base_arguments: list[str], tmp_path: Path, extension: str
) -> None:
    train([*base_arguments, "--save_model_as", extension])
    train([*base_arguments, "--output_name", "other"])
    weights = torch.load(tmp_path / "out" / f"mine.{extension}", weights_only=True)
    other = load_saved(tmp_path, "other.safetensors")
    assert set(weights) == set(other) and all(torch.equal(weights[name], other[name]) for name in other)


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer_type", "AdamW8bit"],
        ["--optimizer_type", "lion"],
        ["--optimizer_type", "prodigy", "--learning_rate", "1"],
        ["--optimizer_type", "AdamWScheduleFree"],
        ["--optimizer_type", "Adafactor"],
        ["--optimizer_type", "RMSprop", "--lr_scheduler", "cosine", "--lr_warmup_steps", "0.25"],
    ],
    ids=lambda options: options[1],
)
def test_optimizers_change_the_weights(
    train: Train, base_arguments: list[str], tmp_path: Path, options: list[str]
) -> None:
    train([*base_arguments, *options]).ok()
    ups = [w for name, w in load_saved(tmp_path).items() if name.endswith("lora_up.weight")]
    assert all(w.isfinite().all() for w in ups) and any(w.abs().max() > 0 for w in ups)


def test_all_noise_and_loss_options_work_together(train: Train, base_arguments: list[str]) -> None:
    options = [
        "--noise_offset", "0.1", "--noise_offset_random_strength", "--adaptive_noise_scale", "0.01",
        "--multires_noise_iterations", "3", "--ip_noise_gamma", "0.1", "--ip_noise_gamma_random_strength",
        "--min_timestep", "100", "--max_timestep", "900", "--loss_type", "huber", "--huber_schedule", "exponential",
        "--min_snr_gamma", "5", "--debiased_estimation_loss", "--clip_skip", "2", "--max_token_length", "150",
        "--weighted_captions", "--gradient_accumulation_steps", "2", "--caption_dropout_rate", "0.2",
        "--shuffle_caption", "--keep_tokens", "1", "--caption_tag_dropout_rate", "0.2", "--flip_aug", "--random_crop",
        "--color_aug",
    ]  # fmt: skip
    done = train([*base_arguments, *options]).ok()
    assert done.losses and all(loss > 0 for loss in done.losses)


def test_v_prediction_with_zero_terminal_snr_trains(train: Train, base_arguments: list[str]) -> None:
    done = train(
        [*base_arguments, "--v_parameterization", "--zero_terminal_snr", "--scale_v_pred_loss_like_noise_pred"]
    ).ok()
    assert done.losses and all(loss > 0 for loss in done.losses)


def test_prior_loss_weight_scales_the_loss_of_regularisation_images(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    """With weight 0 the loss of mixed batches is lower than that of the same run with weight 1."""
    make_images(tmp_path / "reg" / "1_class", 12, seed=9)
    options = ["--reg_data_dir", str(tmp_path / "reg"), "--learning_rate", "1e-12"]
    full = train([*base_arguments, *options, "--prior_loss_weight", "1"])
    none = train([*base_arguments, *options, "--prior_loss_weight", "0"]).ok()
    assert none.losses[-1] < full.losses[-1]


def test_a_third_party_network_trains_and_saves(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    options = ["--network_module", "lycoris.kohya", "--network_args", "algo=lokr", "preset=attn-mlp", "factor=4"]
    train([*base_arguments, *options]).ok()
    names = set(load_saved(tmp_path))
    assert any(".lokr_w" in name and name.startswith("lora_unet_down_blocks_") for name in names)
    assert any(".lokr_w" in name and name.startswith("lora_te_text_model_encoder_layers_") for name in names)


def test_debug_dataset_shows_batches_and_stops(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    done = train([*base_arguments, "--debug_dataset", "--console_log_simple"])
    assert done.status == 0
    assert "00.png" in done.stdout + done.stderr
    assert not (tmp_path / "out").exists() or not files(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_debug_dataset_needs_no_model(train: Train, script: str, images: Path) -> None:
    words = ["--train_data_dir", str(images), "--caption_extension", ".txt", "--resolution", "64"]
    done = train([*words, "--debug_dataset", "--console_log_simple"], script).ok()
    num_channels = 4 if SCRIPTS[script].latents.has_alpha else 3
    assert f"12 x pixels (1, {num_channels}, 64, 64)" in done.stdout and "captions are not counted" in done.stdout


@pytest.mark.parametrize("more", [[], ["--debug_dataset"], ["--audit_only"]], ids=" ".join)
def test_a_dataset_without_images_ends_with_status_1(
    train: Train, base_arguments: list[str], tmp_path: Path, more: list[str]
) -> None:
    (tmp_path / "my_cats").mkdir()
    done = train([*base_arguments, "--train_data_dir", str(tmp_path / "my_cats"), "--console_log_simple", *more])
    assert done.status == 1
    assert "ERROR: No data found: --train_data_dir" in done.stdout
    done = train([*base_arguments, "--train_data_dir", str(tmp_path / "my_cat"), "--console_log_simple", *more])
    assert done.status == 1
    expected = f"No data found: --train_data_dir {tmp_path}/my_cat does not exist; did you mean {tmp_path}/my_cats?"
    assert expected in done.stdout


@pytest.mark.parametrize(("num_steps", "wanted", "traced"), [(5, 2, 2), (3, 4, 1)])
def test_tracing_steps_writes_a_file_and_does_not_change_results(
    train: Train, base_arguments: list[str], tmp_path: Path, num_steps: int, wanted: int, traced: int
) -> None:
    """Tracing starts at the third step; a run that ends earlier has a shorter trace."""
    length = ["--max_train_steps", str(num_steps)]
    train([*base_arguments, *length, "--output_name", "plain"])
    train([*base_arguments, *length, "--profile", str(wanted)]).ok()
    trace = json.loads(gzip.decompress((tmp_path / "out" / "mine-profile.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    counts = {stage: names.count(stage) for stage in IN_STEP}
    waited = counts.pop("waiting for data")  # for the next step's batch, which the last step lacks
    assert set(counts.values()) == {traced} and traced - 1 <= waited <= traced and "aten::addmm" in names
    plain, with_trace = load_saved(tmp_path, "plain.safetensors"), load_saved(tmp_path)
    assert all(torch.equal(weight, with_trace[name]) for name, weight in plain.items())


OWN_DATASET = """
import torch

class Noise:
    batch_size = 2

    def __init__(self, tokenizer, max_token_length, resolution, debug_dataset):
        self.size = resolution

    def __len__(self):
        return 3

    def __getitem__(self, number):
        g = torch.Generator().manual_seed(number)
        return {"images": torch.rand(2, 3, *self.size, generator=g) * 2 - 1, "captions": [f"noise {number}", "more"]}
"""


def test_a_custom_dataset_class_trains_and_resumes_bit_for_bit(
    train: Callable[..., Finished], base_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_noise.py").write_text(OWN_DATASET)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [*base_arguments, "--dataset_class", "my_noise.Noise", "--max_train_steps", "5"]
    uninterrupted = train([*words, "--save_state", "--save_every_n_steps", "2"]).ok()
    assert "--train_data_dir is ignored: --dataset_class provides the data" in uninterrupted.stderr
    assert "my_noise.Noise: 3 batches per epoch" in uninterrupted.stderr
    state = str(tmp_path / "out" / "mine-step00000002-state")
    train([*words, "--resume", state, "--output_name", "resumed"]).ok()
    expected, other = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("mine", "resumed"))
    assert all(torch.equal(expected[key], other[key]) for key in expected)
    folder = words.index("--train_data_dir")
    shown = train([*words[:folder], *words[folder + 2 :], "--debug_dataset"])  # no dataset options are needed
    assert shown.status == 0 and "3 x pixels (2, 3, 64, 64)" in shown.stderr
    refused = train([*words, "--cache_latents"])
    assert refused.status == 1 and "--cache_latents does not work with --dataset_class" in refused.stderr
    unknown = train([*base_arguments, "--dataset_class", "my_noise.Nois"])
    assert unknown.status == 1 and "did you mean Noise?" in unknown.stderr


@pytest.mark.nightly
def test_compiled_blocks_train_the_same_adapter(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    """The `eager` backend runs graphs unchanged; the first step of each size is counted and not compiled."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    words = [*base_arguments, "--gradient_checkpointing", "--network_dropout", "0.2", "--network_train_unet_only"]
    train([*words, "--output_name", "plain"])
    assert not counters["stats"]
    train([*words, "--output_name", "compiled", "--torch_compile", "--dynamo_backend", "eager"]).ok()
    assert 0 < counters["stats"]["unique_graphs"] <= 20
    plain, compiled = load_saved(tmp_path, "plain.safetensors"), load_saved(tmp_path, "compiled.safetensors")
    # Small convolutions are matrix products unless they are compiled: rounding makes 4e-6.
    assert all((compiled[name] - weight).norm() < 1e-4 * weight.norm() for name, weight in plain.items())
    torch._dynamo.reset()


def test_no_data_loader_worker_outlives_training(
    train: Train, base_arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise torch waits five seconds for each at exit, kills it and reports a failure."""
    alive: list[int] = []

    def ended(run: Any, log: Any) -> None:
        alive.append(len(multiprocessing.active_children()))

    monkeypatch.setattr("library.data.batches.planned.PlannedBatches.report_skipped", ended)
    words = [*base_arguments, "--max_data_loader_n_workers", "2", "--persistent_data_loader_workers"]
    assert train(words).status == 0
    assert alive == [0]
