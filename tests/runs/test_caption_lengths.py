"""Batches of captions of different lengths, whose tokens are padded to a multiple of a fixed number."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.checkpoints.files import load_state_dict
from library.data.caching import text_files
from tests.running import Finished, make_images, small_run
from tests.tiers import first_is_fast
from tests.tiny.bases import BASES

Train = Callable[..., Finished]


@pytest.mark.parametrize("name", first_is_fast(["krea2", *(n for n in BASES if n != "krea2" and BASES[n].caches_text)]))
def test_padding_to_a_multiple_changes_no_result(
    name: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, images = BASES[name], tmp_path / "data"
    make_images(images / "1_thing", 4, seed=3)
    for number, path in enumerate(sorted((images / "1_thing").glob("*.png"))):
        path.with_suffix(".txt").write_text("a red cat " * (1 + number))
    model = base.build(tmp_path / "model")
    for step in (1, text_files.TOKEN_STEP):
        monkeypatch.setattr(text_files, "TOKEN_STEP", step)
        words = [*model, *small_run(images, tmp_path, base.module, "2"), "--output_name", f"of_{step}"]
        done = train([*words, "--mixed_precision", "no", "--optimizer_type", "SGD"], script=base.script)
        assert done.status == 0, done.stderr
        shows_two = "inputs had 2 shapes in an epoch" in done.stderr
        assert shows_two == (step == 1) or (name != "krea2" and not shows_two), done.stderr
    files = [load_state_dict(tmp_path / "out" / f"of_{step}.safetensors") for step in (1, 64)]
    for key, tensor in files[0].items():
        torch.testing.assert_close(files[1][key], tensor, rtol=1e-5, atol=1e-6)
    assert any(tensor.any() for key, tensor in files[0].items() if "lora_up" in key or "lora_B" in key)
