"""hunyuan_image_train_network.py on a tiny HunyuanImage 2.1 model: it trains, resumes and saves ComfyUI names."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.architectures.hunyuan_image.adapter_names import NAMES
from tests.running import Finished, load_saved, small_run
from tests.tiny.hunyuan_image import build_tiny_hunyuan_image

Train = Callable[..., Finished]


@pytest.fixture(scope="session")
def tiny_arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_hunyuan_image(tmp_path_factory.mktemp("tiny_hunyuan_image"), seed=31)


@pytest.fixture
def arguments(tiny_arguments: list[str], images: Path, tmp_path: Path) -> list[str]:
    """Return arguments for three training steps."""
    (images / "2_thing" / "00.txt").write_text('a red cat with "words" on it')
    return [*tiny_arguments, *small_run(images, tmp_path, "networks.lora_hunyuan_image", "3")]


@pytest.fixture
def train_hunyuan(train: Train) -> Train:
    return partial(train, script="hunyuan_image_train_network")


def test_training_continues_from_a_file_with_sd_scripts_names(
    train_hunyuan: Train, arguments: list[str], tmp_path: Path
) -> None:
    assert train_hunyuan(arguments).status == 0
    first, theirs = load_saved(tmp_path), tmp_path / "theirs.safetensors"
    spelled = {module.kohya: module.aliases[0] for module in NAMES.modules if module.aliases}
    split = {key: key.partition(".") for key in first}
    save_file({spelled.get(name, name) + "." + leaf: first[key] for key, (name, _, leaf) in split.items()}, theirs)
    go_on = ["--network_weights", str(theirs), "--learning_rate", "1e-9", "--output_name", "more"]
    done = train_hunyuan([*arguments, *go_on])
    assert done.status == 0, done.stderr
    assert "26 modules loaded" in done.stderr
    more = load_saved(tmp_path, "more")
    assert more.keys() == first.keys()
    for key, weight in first.items():
        torch.testing.assert_close(more[key], weight, rtol=1e-3, atol=1e-6)
    merged = ["--base_weights", str(theirs), "--fp8_scaled", "--fp8_vl", "--output_name", "merged"]
    merged += ["--text_encoder_cpu", "--vae_chunk_size", "16"]
    done = train_hunyuan([*arguments, *merged])
    assert done.status == 0, done.stderr
    assert "layers in 8 bits" in done.stderr and f"merged {theirs}" in done.stdout + done.stderr
