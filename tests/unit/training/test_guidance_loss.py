"""The loss that keeps a distilled model's guidance, and frozen captions."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from library.architectures.flux.options import FluxOptions
from library.architectures.flux_2.options import Flux2Options
from library.base.errors import UserError
from library.options.leco import leco_options
from library.options.train import TrainOptions
from library.training.command_line.cli import build_parser, check_words, from_program
from library.training.command_line.option_checks import check_concepts, check_options
from library.training.step.conditioning import CaptionMemo
from library.types import Conditioning
from tests.parity.test_counting import open_tiny

REFUSED = "--guidance_scale is {}, but takes the value of --guidance_loss, 3.0; leave out --guidance_scale"


def read(words: list[str], kind: type[TrainOptions] = FluxOptions) -> argparse.Namespace:
    parser = build_parser(kind)
    parser.prog = "flux_train_network.py"
    return check_words(parser, lambda args: None, ["--guidance_loss", "3", *words]).args


@pytest.mark.parametrize("scale", ["1.0", "3.5"])
def test_another_guidance_input_of_the_command_line_is_refused(
    fresh_process: None, capfd: pytest.CaptureFixture[str], scale: str
) -> None:
    """Also the default, if it is typed."""
    with pytest.raises(SystemExit) as end:
        read(["--guidance_scale", scale])
    assert end.value.code == 1
    assert REFUSED.format(scale) in " ".join(capfd.readouterr().err.split())


def test_another_guidance_input_of_the_config_file_is_refused_and_that_of_a_recipe_gives_way(
    fresh_process: None, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "own file.toml"
    config.write_text("guidance_scale = 1.0\n")
    for words in (["--config_file", str(config)], ["--config_file", str(config), "--recipe", "flux_character"]):
        with pytest.raises(SystemExit):
            read(words)
        assert REFUSED.format(1.0) in " ".join(capfd.readouterr().err.split())
    assert read(["--recipe", "flux_character"]).guidance_scale == 1.0
    assert read(["--guidance_scale", "3"]).guidance_scale == 3.0
    assert read(["--guidance_scale", "0", "--model_type", "chroma"]).guidance_scale == 0.0


def test_a_calling_program_is_refused_too(fresh_process: None) -> None:
    parser = build_parser(FluxOptions)
    with pytest.raises(UserError, match="leave out --guidance_scale"):
        from_program(parser, argparse.Namespace(guidance_loss=3.0, guidance_scale=1.0))
    assert from_program(parser, argparse.Namespace(guidance_loss=3.0, guidance_scale=3.5)).guidance_loss == 3.0


@pytest.mark.parametrize(("name", "scale"), [("flux", 3.0), ("flux_2", 3.0), ("chroma", 0.0)])
def test_models_with_guidance_as_an_input_get_the_scale(
    fresh_process: None, tmp_path: Path, name: str, scale: float
) -> None:
    """Chroma has no such input: it was trained with 0."""
    more = ["--guidance_scale", "0"] if name == "chroma" else []
    _, arch = open_tiny(name, tmp_path, "--guidance_loss", "3", *more)
    predict: Any = arch.predict
    assert predict.keywords["guidance"] == scale
    if name != "flux_2":  # which has no option to record
        assert float(arch.metadata["ss_guidance_scale"]) == scale


def test_prompts_without_images_and_preferences_are_refused(tmp_path: Path) -> None:
    kind = leco_options(Flux2Options)
    options = kind().with_values({"guidance_loss": 3.0})
    assert options.concepts is not None
    with pytest.raises(UserError, match="--guidance_loss does not work with --prompts_file"):
        check_concepts(options, options.concepts)
    values = {"guidance_loss": 3.0, "preference_loss": "dpo", "train_data_dir": str(tmp_path), "resolution": "64"}
    with pytest.raises(UserError, match=r"--guidance_loss 3\.0 does not work with --preference_loss dpo"):
        check_options(TrainOptions().with_values(values))
    with pytest.raises(UserError, match=r"--guidance_loss is 0\.5; use at least 1"):
        check_options(TrainOptions().with_values({**values, "guidance_loss": 0.5}))


# Frozen captions are encoded once.


class Encoder:
    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        self.calls.append(list(captions))
        return {"hidden_state": torch.tensor([[float(len(caption))] * 4 for caption in captions])}


def test_each_caption_is_encoded_once_in_a_batch_of_its_own() -> None:
    encoder = Encoder()
    memo = CaptionMemo(encoder)
    first = memo(["a", "bcd", "a"])
    second = memo(["bcd", ""])
    assert encoder.calls == [["a"], ["bcd"], [""]]
    assert first["hidden_state"][:, 0].tolist() == [1, 3, 1]
    assert second["hidden_state"][:, 0].tolist() == [3, 0]


def test_beyond_the_limit_the_least_recently_used_caption_is_evicted() -> None:
    encoder = Encoder()
    memo = CaptionMemo(encoder, limit_bytes=2 * 16)
    memo(["a"]), memo(["b"]), memo(["a"]), memo(["c"])  # b is the least recently used when c is added
    memo(["a"])
    assert encoder.calls == [["a"], ["b"], ["c"]]
    memo(["b"])
    assert encoder.calls[-1] == ["b"]


def test_conditioning_of_frozen_captions_has_no_gradient() -> None:
    weight = torch.ones(4, requires_grad=True)
    memo = CaptionMemo(lambda captions: {"hidden_state": weight.expand(len(captions), 4) * 2})
    assert not memo(["x"])["hidden_state"].requires_grad
