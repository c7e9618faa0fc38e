"""Every architecture trains, validates and draws on a device without float64, with the results of the CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.checkpoints.files import load_state_dict
from library.models import rotary
from library.processes.process_group import Processes
from library.training.command_line import training
from tests.device_standin import device_without_float64
from tests.running import Finished, make_images
from tests.tiny.bases import BASES

Train = Callable[..., Finished]


# U-Nets compute no rotary angles and the other models share one function, so these two cover the rest
SLOW = tuple(name for name in BASES if name not in ("flux", "flux_2"))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.nightly] if n in SLOW else []) for n in BASES])
def test_a_run_needs_no_float64_on_its_device(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    base = BASES[name]
    make_images(tmp_path / "data" / "1_thing", 3, seed=62)
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    words = [
        *base.build(tmp_path / "model"), "--train_data_dir", str(tmp_path / "data"), "--caption_extension", ".txt",
        "--resolution", "64", "--output_name", "mine", "--network_module", base.module, "--network_dim", "4",
        "--learning_rate", "1e-3", "--seed", "5", "--max_data_loader_n_workers", "0", "--max_train_steps", "1",
        "--validation_split", "0.4", "--validate_every_n_steps", "1", "--sample_every_n_steps", "1",
        "--sample_prompts", str(tmp_path / "prompts.txt"), "--scale_weight_norms", "1", "--save_state",
    ]  # fmt: skip
    # The simulated device has no complex numbers, and sums round differently.
    monkeypatch.setattr(rotary, "HAVE_COMPLEX", ())
    plain = train([*words, "--output_dir", str(tmp_path / "plain")], script=base.script)
    assert plain.status == 0, plain.stderr
    with device_without_float64() as device:
        monkeypatch.setattr(training, "from_accelerator", lambda accelerator: Processes(device=device))
        done = train([*words, "--output_dir", str(tmp_path / "there")], script=base.script)
    assert done.status == 0, done.stderr
    first, second = (load_state_dict(tmp_path / folder / "mine.safetensors") for folder in ("plain", "there"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert len(list((tmp_path / "there" / "sample").glob("*.png"))) == 1
