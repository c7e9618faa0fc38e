"""Every documented network argument in the training script: train, save, reload, merge, load elsewhere."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from tests.running import Finished, load_saved

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
