"""Errors that would end a run later are found before anything is read or encoded."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from library.checkpoints.weights import Weights
from tests.running import SCRIPTS, Finished, make_images
from tests.tiny.bases import BASES

Train = Callable[..., Finished]

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
