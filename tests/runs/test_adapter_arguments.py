"""Documented network arguments in the training script: train, save, reload, merge, load elsewhere."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from library.checkpoints.files import load_state_dict
from networks.core.kinds.dylora import STREAM
from tests.running import ROOT, Finished, load_saved, make_images
from tests.tiny.sdxl import build_tiny_sdxl
from tools.check_lora_weights import main
from tools.extract_lora_from_dylora import main as extract

Train = Callable[..., Finished]

# The page's full example: convolutions, LoRA+, dropout and DoRA under bf16 with an 8-bit optimizer.
PAGE_OPTIONS = [
    "--mixed_precision", "bf16", "--optimizer_type", "adamw8bit", "--gradient_checkpointing",
    "--network_dim", "8", "--network_alpha", "4",
]  # fmt: skip
PAGE_ARGUMENTS = ["conv_dim=4", "conv_alpha=2", "loraplus_lr_ratio=4", "rank_dropout=0.1", "dora_wd=True"]


def weight_suffixes(weights: dict[str, Tensor]) -> set[str]:
    return {key.partition(".")[2] for key in weights}


def without_suffix(weights: dict[str, Tensor], leaf: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in weights.items() if not key.endswith(leaf)}


def test_the_documented_full_example_trains_and_loads_in_diffusers(
    train: Train, base_arguments: list[str], tiny_sd_folder: Path, tmp_path: Path
) -> None:
    done = train([*base_arguments, *PAGE_OPTIONS, "--network_args", *PAGE_ARGUMENTS]).ok()
    weights = load_saved(tmp_path)
    assert weight_suffixes(weights) == {"alpha", "dora_scale", "lora_down.weight", "lora_up.weight"}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert all(w.abs().max() > 0 for key, w in weights.items() if key.endswith("lora_up.weight"))
    assert re.search(r"denoiser: \d+ modules adapted, rank 4, 8, alpha 2, 4, .*; DoRA in \d+", done.stderr)
    assert re.search(r"learning rates: textencoder .*, textencoder plus 0.004 .*, unet plus 0.004", done.stderr)

    from diffusers import StableDiffusionPipeline
    from peft.tuners.tuners_utils import BaseTunerLayer

    save_file(without_suffix(weights, ".dora_scale"), tmp_path / "plain.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd_folder, safety_checker=None, feature_extractor=None)
    pipeline.load_lora_weights(tmp_path, weight_name="plain.safetensors")
    parts = (pipeline.unet, pipeline.text_encoder)
    num_loaded = sum(isinstance(module, BaseTunerLayer) for part in parts for module in part.modules())
    assert num_loaded == sum(key.endswith(".alpha") for key in weights)


def test_the_argument_named_like_the_parameter_of_modules_is_the_option(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    train([*base_arguments, "--network_dropout", "0.5"]).ok()
    by_option = load_saved(tmp_path)
    train([*base_arguments, "--network_args", "neuron_dropout=0.5"]).ok()
    by_argument = load_saved(tmp_path)
    assert by_option.keys() == by_argument.keys()
    assert all(torch.equal(by_option[key], by_argument[key]) for key in by_option)


@pytest.mark.parametrize("module", ["networks.lora", "networks.lora_fa", "networks.dylora"])
def test_norms_stay_within_the_limit_and_are_shown_in_the_progress_bar(
    train: Train, base_arguments: list[str], tmp_path: Path, module: str
) -> None:
    limit = ["--scale_weight_norms", "0.02", "--learning_rate", "0.05", "--logging_dir", str(tmp_path / "logs")]
    done = train([*base_arguments, "--network_module", module, *limit]).ok()
    weights = load_saved(tmp_path)
    names = {key.partition(".")[0] for key in weights}
    norms = []
    for name in names:
        up, down = (weights[f"{name}.lora_{side}.weight"].flatten(1) for side in ("up", "down"))
        norms.append(float((up @ down).norm() * weights[f"{name}.alpha"] / len(down)))
    assert max(norms) == pytest.approx(0.02, rel=1e-4)
    shown_norms = re.findall(r"Keys Scaled=(\d+), Average key norm=([\d.e-]+), avr_loss=[\d.]+", done.stderr)
    assert shown_norms and max(int(count) for count, _ in shown_norms) > 0
    assert float(shown_norms[-1][1]) == pytest.approx(sum(norms) / len(norms), rel=0.01)
    assert {"max_norm/keys_scaled", "max_norm/max_key_norm", "norm/avg_key_norm"} <= chart_names(tmp_path / "logs")


def chart_names(folder: Path) -> set[str]:
    """Return the names of the scalars in the TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    return set(accumulator.Tags()["scalars"])


def test_a_module_that_cannot_limit_norms_trains_with_a_warning(
    train: Train, base_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "import networks.lora as own\n\ndef create_network(*arguments, **keywords):\n"
    source += "    network = own.create_network(*arguments, **keywords)\n"
    source += "    network.apply_max_norm_regularization = None\n    return network\n"
    (tmp_path / "adapter_without_limit.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = ["--network_module", "adapter_without_limit", "--scale_weight_norms", "0.01"]
    done = train([*base_arguments, *options]).ok()
    assert "--scale_weight_norms has no effect: the network of adapter_without_limit has no" in done.stderr
    assert "Keys Scaled" not in done.stderr


# networks.dylora and networks.lora_fa in the training script: train, save, extract, continue, merge.

CONV = ["conv_dim=4", "conv_alpha=2"]
DYLORA = ["--network_module", "networks.dylora", "--network_dim", "8", "--network_alpha", "4"]


def path_of(tmp_path: Path, name: str) -> Path:
    return tmp_path / "out" / f"{name}.safetensors"


def test_every_rank_extracted_from_a_trained_file_trains_and_merges(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    train([*base_arguments, *DYLORA, "--network_args", "dyloRA=4", *CONV]).ok()
    trained_path = path_of(tmp_path, "mine")
    assert extract(["--model", str(trained_path), "--save_to", str(trained_path)]) == 0  # the unit is in the metadata
    assert sorted(p.stem for p in trained_path.parent.iterdir()) == ["mine", "mine-0004", "mine-0008"]
    full, half = load_saved(tmp_path, "mine-0008"), load_saved(tmp_path, "mine-0004")
    assert all(torch.equal(weight, full[key]) for key, weight in load_saved(tmp_path, "mine").items())
    ranks = {key: w.shape[0] for key, w in half.items() if key.endswith("lora_down.weight")}
    assert {rank for key, rank in ranks.items() if full[key].shape[0] == 8} == {4}
    assert {rank for key, rank in ranks.items() if full[key].shape[0] == 4} == {2}
    assert {float(w) for key, w in half.items() if key.endswith("alpha")} == {2.0, 1.0}
    with safe_open(path_of(tmp_path, "mine-0004"), "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "4"
    assert json.loads(metadata["ss_network_args"])["dyloRA"] == "4"

    cut = str(path_of(tmp_path, "mine-0004"))
    options = [*base_arguments, "--max_train_steps", "1"]
    train([*options, "--output_name", "on", "--network_weights", cut, "--dim_from_weights"]).ok()
    assert {key: w.shape for key, w in load_saved(tmp_path, "on").items()} == {key: w.shape for key, w in half.items()}
    train([*options, *DYLORA, "--output_name", "merged", "--base_weights", str(trained_path)]).ok()


def test_training_continues_from_a_dylora_file_with_its_unit(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    first = [*base_arguments, *DYLORA, "--output_name", "first"]
    train([*first, "--network_args", "unit=2"])
    file = ["--network_weights", str(path_of(tmp_path, "first")), "--network_module", "networks.dylora"]
    more = ["--output_name", "more", "--max_train_steps", "3"]
    train([*base_arguments, *DYLORA, *file, *more, "--network_args", "unit=2"]).ok()
    expected = load_saved(tmp_path, "more")
    train([*base_arguments, *file, *more, "--dim_from_weights", "--network_args", "unit=2"]).ok()
    assert all(torch.equal(weight, expected[key]) for key, weight in load_saved(tmp_path, "more").items())


def test_all_batches_of_an_accumulation_window_use_the_rank_of_their_step(
    train: Train, base_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six batches per epoch in windows of four give steps of 4, 2, 4 and 2 batches."""
    (tmp_path / "recording_network.py").write_text(
        "from networks import dylora\n"
        "calls = []\n"
        "def create_network(*arguments, **keywords):\n"
        "    network = dylora.create_network(*arguments, **keywords)\n"
        "    draw = network.start_step\n"
        "    def record(adapters, seed, step):\n"
        "        draw(adapters, seed, step)\n"
        "        calls.append((seed, step, {a.change.delta._rows for a in adapters}))\n"
        "    network.start_step = record\n"
        "    return network\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    train(
        [*base_arguments, *DYLORA, "--network_module", "recording_network", "--gradient_accumulation_steps", "4"]
    ).ok()
    calls = importlib.import_module("recording_network").calls
    del sys.modules["recording_network"]
    assert [(seed, step) for seed, step, _ in calls] == [(5, s) for s in (0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3)]
    ranks: dict[int, set[tuple[int, int]]] = {}
    for _, step, rows in calls:
        assert len(rows) == 1
        ranks.setdefault(step, set()).update(rows)
    assert all(len(drawn) == 1 for drawn in ranks.values())
    assert STREAM == "dylora rank"  # a different name would draw different ranks for seeds that users rely on


RECORDING = """
from networks import tlora
levels = []
def create_network(*arguments, **keywords):
    network = tlora.create_network(*arguments, **keywords)
    listen = network.on_noise_levels
    def record(levels_B):
        listen(levels_B)
        levels.append((network.training, None if levels_B is None else levels_B.tolist()))
    network.on_noise_levels = record
    return network
"""


def test_tlora_receives_noise_levels_in_training_and_validation_but_not_in_previews(
    train: Train, base_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recording_levels.py").write_text(RECORDING)
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    measuring = ["--validation_split", "0.5", "--validate_every_n_steps", "2", "--max_validation_steps", "1"]
    drawing = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2"]
    train([*base_arguments, "--network_module", "recording_levels", *measuring, *drawing]).ok()
    levels = importlib.import_module("recording_levels").levels
    del sys.modules["recording_levels"]
    trained = [values for is_training, values in levels if is_training and values is not None]
    validated = [values for is_training, values in levels if not is_training and values is not None]
    assert len(trained) >= 4
    assert validated
    assert all(0 <= level < 1 for values in trained + validated for level in values)
    assert len({level for values in trained for level in values}) > 4
    assert levels[-1][1] is None  # the last previews are drawn after the last step, with all ranks


def test_a_pissa_run_on_an_8_bit_base_resumes_bit_for_bit_and_continues_from_its_file(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    arguments = [*base_arguments, "--base_format", "int8", "--network_args", "init=pissa", "rank_dropout=0.2"]
    train([*arguments, "--save_state", "--save_every_n_steps", "2"]).ok()
    expected = load_saved(tmp_path, "mine")
    state = str(tmp_path / "out" / "mine-step00000002-state")
    train([*arguments, "--resume", state, "--output_name", "resumed"]).ok()
    actual = load_saved(tmp_path, "resumed")
    assert all(torch.equal(actual[key], weight) for key, weight in expected.items())
    assert {w.shape[0] for key, w in actual.items() if key.endswith("lora_down.weight")} == {8}

    more = ["--network_weights", str(path_of(tmp_path, "mine")), "--max_train_steps", "1", "--learning_rate", "0"]
    train([*arguments, *more, "--unet_lr", "1e-9", "--output_name", "still"]).ok()
    for key, weight in load_saved(tmp_path, "still").items():
        torch.testing.assert_close(weight, expected[key], rtol=1e-6, atol=1e-6)  # one rounding of a sum in the file


def test_files_hold_the_averaged_weights_unless_the_trained_ones_are_requested(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    """Compare with the average of the weights of each step, saved by a run without averaging."""
    train([*base_arguments, "--save_every_n_steps", "1", "--learning_rate", "0.05"]).ok()
    steps = [load_saved(tmp_path, f"mine-step{step:08d}") for step in (1, 2, 3)] + [load_saved(tmp_path, "mine")]
    arguments = [*base_arguments, "--learning_rate", "0.05", "--ema_decay", "0.3"]
    for name, more in (("average", []), ("trained", ["--ema_used_for", "previews"])):
        train([*arguments, "--output_name", name, *more]).ok()
    average, trained = load_saved(tmp_path, "average"), load_saved(tmp_path, "trained")
    for key, weight in steps[-1].items():
        assert torch.equal(trained[key], weight)
        expected = steps[0][key].double()
        for step, decay in enumerate((2 / 11, 3 / 12, 4 / 13)):
            expected = min(decay, 0.3) * expected + (1 - min(decay, 0.3)) * steps[step + 1][key].double()
        torch.testing.assert_close(average[key].double(), expected, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(average[key], trained[key]) for key in trained)
    with safe_open(path_of(tmp_path, "average"), "pt") as file:
        assert file.metadata()["ss_ema_decay"] == "0.3"
    with safe_open(path_of(tmp_path, "trained"), "pt") as file:
        assert "ss_ema_decay" not in file.metadata()


@pytest.mark.nightly
def test_a_bf16_adapter_with_stochastic_rounding_learns_and_resumes_bit_for_bit(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    """At this learning rate plain bf16 changes few of the randomly initialised weights."""
    arguments = [*base_arguments, "--mixed_precision", "bf16", "--full_bf16", "--learning_rate", "1e-5"]
    words = [*arguments, "--stochastic_rounding", "--optimizer_type", "Muon", "--network_args", *CONV]
    done = train([*words, "--save_state", "--save_every_n_steps", "2"]).ok()
    assert "AdamW moves the others" in done.stderr
    expected, early = load_saved(tmp_path, "mine"), load_saved(tmp_path, "mine-step00000002")
    state = str(tmp_path / "out" / "mine-step00000002-state")
    train([*words, "--resume", state, "--output_name", "resumed"]).ok()
    assert all(torch.equal(weight, expected[key]) for key, weight in load_saved(tmp_path, "resumed").items())
    assert {w.dtype for key, w in expected.items() if "lora" in key.partition(".")[2]} == {torch.bfloat16}
    moved = [float((expected[k] != early[k]).float().mean()) for k in expected if k.endswith("lora_down.weight")]
    assert sum(moved) / len(moved) > 0.002
    train([*arguments, "--network_args", *CONV, "--output_name", "plain", "--optimizer_type", "Muon"]).ok()


# Third-party network modules that train the base model's norms on the CPU.


@pytest.mark.parametrize("algo", ["locon", pytest.param("lokr", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.nightly)])
def test_training_group_norms_on_the_cpu_does_not_crash(tmp_path: Path, algo: str, precision: str) -> None:
    """Use a subprocess, since torch's backward pass of channels-last group norms caused a segmentation fault."""
    pytest.importorskip("lycoris")
    make_images(tmp_path / "data" / "1_thing", 2, seed=64)
    command = [
        sys.executable, str(ROOT / "sdxl_train_network.py"), "--pretrained_model_name_or_path",
        str(build_tiny_sdxl(tmp_path / "model", 53)), "--train_data_dir", str(tmp_path / "data"), "--resolution", "64",
        "--output_dir", str(tmp_path / "out"), "--output_name", "mine", "--network_module", "lycoris.kohya",
        "--network_args", f"algo={algo}", "train_norm=True", "preset=full", "factor=4", "--network_dim", "2",
        "--network_train_unet_only", "--mixed_precision", precision, "--max_train_steps", "2", "--seed", "5",
        "--learning_rate", "1e-2", "--max_data_loader_n_workers", "0",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    norms = [t for key, t in load_state_dict(tmp_path / "out" / "mine.safetensors").items() if key.endswith("w_norm")]
    assert norms and all(float(norm.abs().max()) > 0 for norm in norms)


# The size of an adapter's change: in the last line of a run, and by tools/check_lora_weights.py.


def size_in(text: str) -> float:
    """Return the size that the last line of a text gives, in percent."""
    (size,) = re.findall(r"it changes the adapted weights by ([\d.]+)%: ", text.strip().splitlines()[-1])
    return float(size)


@pytest.mark.parametrize(
    "options",
    [
        ["--network_module", "networks.lora", "--ema_decay", "0.9"],
        ["--network_module", "networks.lora", "--network_args", "dora_wd=True", "conv_dim=4"],
        ["--network_module", "networks.lokr", "--network_args", "factor=2"],
        ["--network_module", "networks.oft"],
        ["--network_module", "networks.lora", "--base_format", "int8", "--blocks_to_swap", "2"],
    ],
    ids=lambda options: " ".join(options[1:]),
)
def test_the_last_line_and_the_tool_agree(
    train: Train, base_arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str]
) -> None:
    done = train([*base_arguments, "--network_train_unet_only", *options]).ok()
    base = base_arguments[base_arguments.index("--pretrained_model_name_or_path") + 1]
    file = str(tmp_path / "out" / "mine.safetensors")
    assert main([file, "--base_model", base]) == 0
    size = size_in(capfd.readouterr().out)
    assert 0 < size == pytest.approx(size_in(done.stderr), rel=0.02, abs=0.006)
    assert main([file, "--base_model", base, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["relative_change"] == pytest.approx(size / 100, abs=6e-5)
    assert report["num_compared"] == len(report["modules"])


def test_a_word_of_all_prompts_that_no_caption_has_is_warned_of(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a zxqcat on grass --w 64 --h 64 --s 1\na sitting zxqcat --w 64 --h 64 --s 1\n")
    arguments = [*base_arguments, "--max_train_steps", "1", "--sample_prompts", str(prompts), "--sample_at_first"]
    done = train([*arguments, "--network_dim", "32"]).ok()
    assert "--sample_prompts: every prompt has 'zxqcat', and no caption, caption_prefix or class_tokens" in done.stderr
    assert "--network_alpha is 1 (its default), so the adapter of --network_dim 32 acts at 1/32" in done.stderr
    prompts.write_text(prompts.read_text().replace("zxqcat", "cat"))
    assert "every prompt has" not in train(arguments).stderr
