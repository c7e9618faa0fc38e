"""networks.dylora and networks.lora_fa through the training script: train, save, go on from the file, merge it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.running import Finished

Train = Callable[..., Finished]
CONV = ["conv_dim=4", "conv_alpha=2"]


def saved(tmp_path: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "out" / f"{name}.safetensors")


@pytest.mark.parametrize("module", ["networks.dylora", "networks.lora_fa"])
def test_a_run_saves_what_networks_lora_saves_and_the_same_seed_gives_the_same_bytes(
    train: Train, base_arguments: list[str], tmp_path: Path, module: str
) -> None:
    arguments = [*base_arguments, "--network_args", *CONV]
    train([*arguments, "--output_name", "lora", "--max_train_steps", "1"])
    for name in ("a", "b"):
        done = train([*arguments, "--network_module", module, "--output_name", name, "--gradient_checkpointing"])
        assert done.status == 0, done.stderr
    plain, a, b = (saved(tmp_path, name) for name in ("lora", "a", "b"))
    assert {key: w.shape for key, w in a.items()} == {key: w.shape for key, w in plain.items()}
    assert all(torch.equal(a[key], b[key]) for key in a)
    ups = [w for key, w in a.items() if key.endswith("lora_up.weight")]
    assert all(w.isfinite().all() and w.abs().max() > 0 for w in ups)
