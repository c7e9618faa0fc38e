"""Every documented network argument in the training script: train, save, reload, merge, load elsewhere."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.running import Finished

Train = Callable[..., Finished]

# The page's full example: convolutions, LoRA+, dropout and DoRA under bf16 with an 8-bit optimizer.
PAGE_OPTIONS = [
    "--mixed_precision", "bf16", "--optimizer_type", "adamw8bit", "--gradient_checkpointing",
    "--network_dim", "8", "--network_alpha", "4",
]  # fmt: skip
PAGE_ARGUMENTS = ["conv_dim=4", "conv_alpha=2", "loraplus_lr_ratio=4", "rank_dropout=0.1", "dora_wd=True"]
EVERY_ARGUMENT = [*PAGE_ARGUMENTS, "module_dropout=0.1", "use_tucker=True", "use_scalar=True", "train_norm=True"]


def load_saved(tmp_path: Path, name: str = "mine") -> dict[str, Tensor]:
    return load_file(tmp_path / "out" / f"{name}.safetensors")


def weight_suffixes(weights: dict[str, Tensor]) -> set[str]:
    return {key.partition(".")[2] for key in weights}


def without_suffix(weights: dict[str, Tensor], leaf: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in weights.items() if not key.endswith(leaf)}


def test_the_documented_full_example_trains_and_loads_in_diffusers(
    train: Train, base_arguments: list[str], tiny_sd_folder: Path, tmp_path: Path
) -> None:
    done = train([*base_arguments, *PAGE_OPTIONS, "--network_args", *PAGE_ARGUMENTS])
    assert done.status == 0, done.stderr
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


@pytest.mark.nightly
def test_all_arguments_together_train_and_training_continues_from_the_file(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    arguments = [*base_arguments, *PAGE_OPTIONS]
    done = train([*arguments, "--network_args", *EVERY_ARGUMENT, "--output_name", "first"])
    assert done.status == 0, done.stderr
    first = load_saved(tmp_path, "first")
    assert weight_suffixes(first) == {
        "alpha", "dora_scale", "lora_down.weight", "lora_mid.weight", "lora_up.weight", "w_norm", "b_norm",
    }  # fmt: skip
    assert all(tensor.isfinite().all() for tensor in first.values())
    assert all(w.abs().max() > 0 for key, w in first.items() if key.endswith(("w_norm", "b_norm", "lora_up.weight")))
    file = str(tmp_path / "out" / "first.safetensors")
    idle = ["--learning_rate", "1e-9", "--max_train_steps", "1", "--optimizer_type", "SGDNesterov"]
    for name, extra in (
        ("settings", ["--network_args", *EVERY_ARGUMENT]),
        ("file", ["--dim_from_weights", "--network_args", "rank_dropout=0.1"]),
    ):
        done = train([*arguments, "--output_name", name, "--network_weights", file, *extra, *idle])
        assert done.status == 0, done.stderr
        again = load_saved(tmp_path, name)
        assert again.keys() == first.keys()
        for key, weight in first.items():
            torch.testing.assert_close(again[key], weight, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.nightly
def test_merged_adapters_start_from_the_same_loss_as_loaded_ones(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    forms = ["conv_dim=4", "dora_wd=1", "use_tucker=1", "use_scalar=1", "train_norm=1"]
    arguments = [*base_arguments, "--network_args", *forms]
    train([*arguments, "--output_name", "first", "--learning_rate", "0.02", "--max_train_steps", "6"])
    file = str(tmp_path / "out" / "first.safetensors")
    one_step = ["--max_train_steps", "1", "--output_name", "x"]
    plain = train([*arguments, *one_step])
    installed = train([*base_arguments, *one_step, "--network_weights", file, "--dim_from_weights"])
    merged = train([*base_arguments, *one_step, "--base_weights", file])
    assert installed.losses[0] == pytest.approx(merged.losses[0], rel=2e-3)
    assert abs(plain.losses[0] - merged.losses[0]) > 0.01 * plain.losses[0]


@pytest.mark.parametrize("module", ["networks.lora", "networks.lora_fa", "networks.dylora"])
def test_norms_stay_within_the_limit_and_are_shown_in_the_progress_bar(
    train: Train, base_arguments: list[str], tmp_path: Path, module: str
) -> None:
    limit = ["--scale_weight_norms", "0.02", "--learning_rate", "0.05", "--logging_dir", str(tmp_path / "logs")]
    done = train([*base_arguments, "--network_module", module, *limit])
    assert done.status == 0, done.stderr
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


def test_a_negative_norm_limit_is_rejected(train: Train, base_arguments: list[str]) -> None:
    done = train([*base_arguments, "--scale_weight_norms", "-1"])
    assert done.status == 1
    assert "--scale_weight_norms is -1" in done.stderr


def test_a_module_that_cannot_limit_norms_trains_with_a_warning(
    train: Train, base_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "import networks.lora as own\n\ndef create_network(*arguments, **keywords):\n"
    source += "    network = own.create_network(*arguments, **keywords)\n"
    source += "    network.apply_max_norm_regularization = None\n    return network\n"
    (tmp_path / "adapter_without_limit.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = ["--network_module", "adapter_without_limit", "--scale_weight_norms", "0.01"]
    done = train([*base_arguments, *options])
    assert done.status == 0, done.stderr
    assert "--scale_weight_norms has no effect: the network of adapter_without_limit has no" in done.stderr
    assert "Keys Scaled" not in done.stderr
