"""diffusers_train_network.py on tiny pipelines, as users run it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from library.checkpoints.files import load_state_dict
from tests.running import Finished, make_images
from tests.tiny.pipelines import PIPELINES, build_tiny_pipeline

SCRIPT = "diffusers_train_network"
Train = Callable[..., Finished]


@pytest.fixture(scope="module")
def auraflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "auraflow"
    build_tiny_pipeline("AuraFlowPipeline").save_pretrained(folder)
    return folder


def arguments(model: Path, folder: Path, *more: str) -> list[str]:
    if not (folder / "data").exists():
        make_images(folder / "data" / "1_thing", 3)
    return [
        "--pretrained_model_name_or_path", str(model), "--train_data_dir", str(folder / "data"), "--caption_extension",
        ".txt", "--resolution", "64", "--train_batch_size", "2", "--output_dir", str(folder / "out"), "--output_name",
        "mine", "--network_module", "networks.lora", "--network_dim", "4", "--learning_rate", "1e-2",
        "--max_train_steps", "2", "--seed", "5", "--max_data_loader_n_workers", "0", "--cache_latents_to_disk",
        "--cache_text_encoder_outputs_to_disk", "--no_report", *more,
    ]  # fmt: skip


def weights(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_state_dict(path)
    return tensors


def same(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_one_command_trains_auraflow(auraflow: Path, tmp_path: Path, train: Train) -> None:
    done = train(arguments(auraflow, tmp_path), script=SCRIPT)
    assert done.status == 0, done.stderr
    for line in (
        "AuraFlowPipeline: transformer; noise level: timestep = sigma",
        "latents: hidden_states, 4 channels at 1/8 of the size",
        "text: encoder_hidden_states; size: none",
        "constant: attention_kwargs = None, return_dict = False",
        "objective: flow, target noise - latent; batches: captions of any length in one call",
        "dropped captions are the pipeline's own negative prompt",
        "the adapter is loaded by load_lora_weights of AuraFlowPipeline",
        "the prediction for images of 64x64 agrees with the pipeline's own (0)",
    ):
        assert line in done.stderr, line
    trained = weights(tmp_path / "out" / "mine.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in trained.values())


def test_a_second_run_measures_and_encodes_nothing(auraflow: Path, tmp_path: Path, train: Train) -> None:
    first = train(arguments(auraflow, tmp_path), script=SCRIPT)
    again = train(arguments(auraflow, tmp_path, "--output_name", "again"), script=SCRIPT)
    assert "measured and checked" in first.stderr and "measured and checked" not in again.stderr
    assert "the measurement of AuraFlowPipeline is read from" in again.stderr
    assert "Loading weights" in first.stderr and "Loading weights" not in again.stderr  # of the text encoder
    assert same(tmp_path / "out" / "mine.safetensors", tmp_path / "out" / "again.safetensors")


@pytest.mark.slow
def test_another_model_is_measured_anew(auraflow: Path, tmp_path: Path, train: Train) -> None:
    train(arguments(auraflow, tmp_path), script=SCRIPT)
    build_tiny_pipeline("AuraFlowPipeline", seed=8).save_pretrained(tmp_path / "other")
    assert "measured and checked" in train(arguments(tmp_path / "other", tmp_path), script=SCRIPT).stderr


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bytes(auraflow: Path, tmp_path: Path, train: Train) -> None:
    more = ["--caption_dropout_rate", "0.3", "--network_dropout", "0.2", "--max_train_steps", "4", "--enable_bucket",
            "--min_bucket_reso", "64", "--bucket_no_upscale"]  # fmt: skip
    make_images(tmp_path / "data" / "2_wide", 3, seed=4)
    for path in (tmp_path / "data" / "2_wide").glob("*.png"):
        Image.open(path).resize((128, 64)).save(path)
    whole = train(arguments(auraflow, tmp_path, *more), script=SCRIPT)
    assert whole.status == 0, whole.stderr
    named = ["--output_name", "part", "--save_state", "--save_every_n_steps", "2"]
    assert train(arguments(auraflow, tmp_path, *more, *named), script=SCRIPT).status == 0
    state = next((tmp_path / "out").glob("part-*2-state"))
    resumed = train(
        arguments(auraflow, tmp_path, *more, "--output_name", "rest", "--resume", str(state)), script=SCRIPT
    )
    assert resumed.status == 0, resumed.stderr
    assert same(tmp_path / "out" / "mine.safetensors", tmp_path / "out" / "rest.safetensors")


SOME = ("FluxPipeline", "HunyuanDiTPipeline", "StableDiffusionXLPipeline", "ZImagePipeline")
NAMES = [pytest.param(n, marks=pytest.mark.slow if n in SOME else pytest.mark.nightly) for n in sorted(PIPELINES)]


@pytest.mark.parametrize("name", NAMES)
def test_every_pipeline_trains_draws_validates_and_resumes(name: str, tmp_path: Path, train: Train) -> None:
    build_tiny_pipeline(name).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red bird --w 64 --h 128 --s 3 --l 2.5 --n blurred\n")
    more = [
        "--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2", "--validation_split", "0.3",
        "--validate_every_n_steps", "2", "--caption_dropout_rate", "0.5", "--gradient_checkpointing", "--save_state",
        "--save_every_n_steps", "1",
    ]  # fmt: skip
    done = train(arguments(tmp_path / "model", tmp_path, *more), script=SCRIPT)
    assert done.status == 0, done.stderr
    assert "failed, training continues" not in done.stderr, done.stderr
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1
    trained = weights(tmp_path / "out" / "mine.safetensors")
    assert trained and all(tensor.isfinite().all() for tensor in trained.values())
    state = next((tmp_path / "out").glob("mine-*1-state"))
    words = ["--resume", str(state), "--output_name", "rest"]
    rest = train(arguments(tmp_path / "model", tmp_path, *more, *words), script=SCRIPT)
    assert rest.status == 0, rest.stderr
    assert same(tmp_path / "out" / "mine.safetensors", tmp_path / "out" / "rest.safetensors")
