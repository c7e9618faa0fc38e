"""diffusers_train_network.py on tiny pipelines, as users run it: training, features, previews, kept measurements."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.architectures.any_pipeline.assembly import record_memory
from library.architectures.any_pipeline.folder import open_folder
from library.architectures.any_pipeline.kept import (
    NotBelieved,
    drop_unread,
    find_place,
    narrow,
    read_convention,
    write_convention,
)
from library.architectures.any_pipeline.measuring import measure
from library.architectures.any_pipeline.trees import float_tensors
from library.checkpoints.files import load_state_dict
from tests.any_pipeline.published import build_published, find_model
from tests.any_pipeline.test_measured_folder import values_of
from tests.running import Finished, make_images
from tests.runs.test_pairs import PREFERENCES, SLIDER, write_dataset
from tests.tiny.pipelines import PIPELINES, build_tiny_pipeline, watch_pipeline

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
    done = train(arguments(auraflow, tmp_path), script=SCRIPT).ok()
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
    train(arguments(auraflow, tmp_path, *more), script=SCRIPT).ok()
    named = ["--output_name", "part", "--save_state", "--save_every_n_steps", "2"]
    assert train(arguments(auraflow, tmp_path, *more, *named), script=SCRIPT).status == 0
    state = next((tmp_path / "out").glob("part-*2-state"))
    train(arguments(auraflow, tmp_path, *more, "--output_name", "rest", "--resume", str(state)), script=SCRIPT).ok()
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
    done = train(arguments(tmp_path / "model", tmp_path, *more), script=SCRIPT).ok()
    assert "failed, training continues" not in done.stderr, done.stderr
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1
    trained = weights(tmp_path / "out" / "mine.safetensors")
    assert trained and all(tensor.isfinite().all() for tensor in trained.values())
    state = next((tmp_path / "out").glob("mine-*1-state"))
    words = ["--resume", str(state), "--output_name", "rest"]
    train(arguments(tmp_path / "model", tmp_path, *more, *words), script=SCRIPT).ok()
    assert same(tmp_path / "out" / "mine.safetensors", tmp_path / "out" / "rest.safetensors")


# Previews are what the pipeline itself draws with the trained denoiser.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("AuraFlowPipeline", "guidance_scale"),
        ("StableDiffusionXLPipeline", "guidance_scale"),
        ("ZImagePipeline", "guidance_scale"),
        ("FluxPipeline", "true_cfg_scale"),
    ],
)
def test_a_preview_is_the_image_of_the_pipeline_with_the_file(
    name: str, scale: str, tmp_path: Path, train: Train
) -> None:
    build_tiny_pipeline(name).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red bird --w 64 --h 128 --s 3 --l 2.5 --n blurred --d 11\n")
    more = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2", "--no_half_vae"]
    done = train(arguments(tmp_path / "model", tmp_path, *more), script=SCRIPT)
    assert done.status == 0 and "failed, training continues" not in done.stderr, done.stderr
    (drawn,) = (tmp_path / "out" / "sample").glob("*.png")
    pipe = build_tiny_pipeline(name)
    pipe.load_lora_weights(str(tmp_path / "out" / "mine.safetensors"))
    guided = {scale: 2.5, "negative_prompt": "blurred"}
    generator = torch.Generator().manual_seed(11)
    image = pipe("a red bird", width=64, height=128, num_inference_steps=3, generator=generator, **guided).images[0]
    pixels = [np.asarray(picture, dtype=float) for picture in (Image.open(drawn).convert("RGB"), image)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1.0  # rounding to whole values


VIDEOS = ("WanPipeline", "LTXPipeline", "HunyuanVideoPipeline", "CogVideoXPipeline", "SkyReelsV2Pipeline")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.nightly) for name in VIDEOS])
def test_a_preview_of_a_video_model_is_the_one_frame_that_the_pipeline_draws_with_the_file(
    name: str, tmp_path: Path, train: Train
) -> None:
    build_published(find_model(name), name).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red bird --w 64 --h 128 --s 3 --l 2.5 --n blurred --d 11\n")
    more = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2", "--no_half_vae"]
    done = train(arguments(tmp_path / "model", tmp_path, *more), script=SCRIPT)
    assert done.status == 0 and "failed, training continues" not in done.stderr, done.stderr
    assert f"the adapter is loaded by load_lora_weights of {name}" in done.stderr
    (drawn,) = (tmp_path / "out" / "sample").glob("*.png")
    pipe = build_published(find_model(name), name)
    pipe.load_lora_weights(str(tmp_path / "out" / "mine.safetensors"))
    scale = "true_cfg_scale" if name == "HunyuanVideoPipeline" else "guidance_scale"
    drawing: dict[str, Any] = {scale: 2.5, "negative_prompt": "blurred", "width": 64, "height": 128}
    generator = torch.Generator().manual_seed(11)
    frames = pipe("a red bird", num_frames=1, num_inference_steps=3, generator=generator, output_type="np", **drawing)
    pixels = 255 * np.asarray(frames.frames[0])
    assert pixels.shape == (1, 128, 64, 3)
    assert np.abs(pixels[0] - np.asarray(Image.open(drawn).convert("RGB"), dtype=float)).max() <= 1.0  # whole values


# A measurement is kept by what it depends on, holds what is read, and is believed only if it is what was written.

SIZE = (64, 64)


def measured_with_memory(name: str) -> Any:
    watched = watch_pipeline(build_tiny_pipeline(name))
    convention, _ = measure(watched, SIZE)
    return replace(convention, memory=record_memory(watched, convention))


def test_a_kept_convention_is_read_back_and_holds_only_what_is_read(tmp_path: Path) -> None:
    """Qwen-Image reads the last of the hidden states of its language model, and no logits."""
    convention = measured_with_memory("QwenImagePipeline")
    path = tmp_path / "kept.pt"
    write_convention(path, convention, "abc")
    kept = read_convention(path, "abc")
    assert values_of(kept) == values_of(convention)
    assert len(kept.memory) > 1 and kept.memory.keys() == convention.memory.keys()
    for output in kept.memory.values():
        assert output["logits"].numel() == 0
        assert [state.numel() > 0 for state in output["hidden_states"]] == [False, False, True]


def test_values_are_kept_in_the_type_in_which_they_were_computed() -> None:
    values = torch.randn(100)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert narrow(values.to(dtype).float()).dtype == dtype
    assert narrow(torch.arange(3)).dtype == torch.int64


def test_a_file_that_is_damaged_or_foreign_is_not_believed(tmp_path: Path) -> None:
    convention = measured_with_memory("AuraFlowPipeline")
    path = tmp_path / "kept.pt"
    write_convention(path, convention, "abc")
    whole = path.read_bytes()
    with pytest.raises(NotBelieved, match="not those that were written"):
        read_convention(path, "another pipeline")
    torch.save({"fingerprint": "abc", "digest": "0" * 32, "convention": convention}, path)
    with pytest.raises(NotBelieved, match="not those that were written"):
        read_convention(path, "abc")
    for data in (b"", b"no pickle", whole[:100], whole[:-100]):
        path.write_bytes(data)
        with pytest.raises(NotBelieved):
            read_convention(path, "abc")
    for value in ({}, [1], torch.zeros(2), {"fingerprint": "abc"}):
        torch.save(value, path)
        with pytest.raises(NotBelieved):
            read_convention(path, "abc")


def test_the_file_is_kept_beside_the_caches_or_below_the_hub_s_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hub"))
    assert find_place(str(tmp_path / "cache"), "abc") == tmp_path / "cache" / "pipeline_abc.pt"
    assert find_place(None, "abc").is_relative_to(tmp_path / "hub")
    (tmp_path / "file").write_text("")
    write_convention(tmp_path / "file" / "kept.pt", measured_with_memory("AuraFlowPipeline"), "abc")
    assert "the pipeline is measured again at each start" in caplog.text


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "pipeline.py", "a/merges.txt", "a/spiece.model"])
def test_each_file_that_a_measurement_depends_on_changes_the_fingerprint(name: str, tmp_path: Path) -> None:
    build_tiny_pipeline("AuraFlowPipeline").save_pretrained(tmp_path)
    folder = open_folder(str(tmp_path), False)
    before = folder.fingerprint()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    assert folder.fingerprint() != before


def test_unread_outputs_of_text_encoders_are_dropped() -> None:
    memory = {"a": {"states": (torch.ones(2), torch.ones(3)), "count": 3}}
    kept = drop_unread(memory, {("a", ("states", 1))})
    assert [tensor.numel() for tensor in float_tensors(kept)] == [0, 3] and kept["a"]["count"] == 3


@pytest.mark.slow
def test_a_reversed_target_in_the_kept_file_is_measured_again(tmp_path: Path, train: Train) -> None:
    """A file written by this program with wrong contents is found by the comparison at the start."""
    model = tmp_path / "model"
    build_tiny_pipeline("AuraFlowPipeline").save_pretrained(model)
    words = arguments(model, tmp_path, "--cache_dir", str(tmp_path / "cache"))
    train(words, script=SCRIPT).ok()
    (place,) = (tmp_path / "cache").glob("pipeline_*.pt")
    fingerprint = open_folder(str(model), False).fingerprint()
    right = read_convention(place, fingerprint)
    second = train(words, script=SCRIPT)
    assert second.status == 0 and "is read from" in second.stderr
    write_convention(place, replace(right, target="latent - noise"), fingerprint)
    third = train(words, script=SCRIPT).ok()
    assert f"{place} is not used, and AuraFlowPipeline is measured again: what was measured differs" in third.stderr
    assert read_convention(place, fingerprint).target == "noise - latent"
    place.write_bytes(b"damaged")
    fourth = train(words, script=SCRIPT)
    assert fourth.status == 0 and "is measured again" in fourth.stderr


# What the trainer offers for every base model works for a measured pipeline too.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "auraflow"
    build_tiny_pipeline("AuraFlowPipeline").save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--gradient_checkpointing"],
        ["--blocks_to_swap", "1"],
        ["--gradient_checkpointing", "--cpu_offload_checkpointing"],
    ],
    ids=" ".join,
)
def test_memory_options_give_the_same_bytes(words: list[str], model: Path, tmp_path: Path, train: Train) -> None:
    assert train(arguments(model, tmp_path), script=SCRIPT).status == 0
    train(arguments(model, tmp_path, "--output_name", "other", *words), script=SCRIPT).ok()
    assert same(tmp_path / "out" / "mine.safetensors", tmp_path / "out" / "other.safetensors")


def first_loss(stderr: str) -> float:
    return float(re.findall(r"avr_loss=([\d.e+-]+)", stderr)[0])


@pytest.mark.slow
@pytest.mark.parametrize("base_format", ["int8", "nf4"])
def test_the_base_can_be_stored_in_few_bits(base_format: str, model: Path, tmp_path: Path, train: Train) -> None:
    plain = train(arguments(model, tmp_path), script=SCRIPT)
    done = train(arguments(model, tmp_path, "--base_format", base_format), script=SCRIPT).ok()
    assert re.search(rf"denoiser: \d+ layers in {base_format}", done.stderr)
    assert first_loss(done.stderr) == pytest.approx(first_loss(plain.stderr), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--ema_decay", "0.9"],
        ["--compile", "--compile_backend", "aot_eager"],
        ["--mixed_precision", "bf16", "--full_bf16"],
        ["--gradient_checkpointing", "--caption_dropout_rate", "0.5"],
        ["--guidance_loss", "3", "--cache_text_encoder_outputs", "--network_train_unet_only"],
    ],
    ids=" ".join,
)
def test_other_options_work(words: list[str], model: Path, tmp_path: Path, train: Train) -> None:
    train(arguments(model, tmp_path, *words), script=SCRIPT).ok()
    assert list((tmp_path / "out").glob("mine*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    ["networks.loha", "networks.lokr", "networks.dylora", "networks.oft", "networks.lora_fa", "networks.tlora"],
)
def test_other_kinds_of_adapters_train(module: str, model: Path, tmp_path: Path, train: Train) -> None:
    train(arguments(model, tmp_path, "--network_module", module), script=SCRIPT).ok()


@pytest.mark.slow
def test_memory_is_planned(model: Path, tmp_path: Path, train: Train) -> None:
    train(arguments(model, tmp_path, "--fit", "8GB"), script=SCRIPT).ok()


@pytest.mark.slow
@pytest.mark.parametrize("words", [PREFERENCES, SLIDER], ids=" ".join)
def test_pairs_of_images_train(words: tuple[str, str], model: Path, tmp_path: Path, train: Train) -> None:
    make_images(tmp_path / "preferred", 3, seed=4)
    make_images(tmp_path / "rejected", 3, side=96, seed=5)
    write_dataset(tmp_path, "")
    dataset = ["--train_data_dir", "", "--dataset_config", str(tmp_path / "data.toml")]
    done = train(arguments(model, tmp_path, *dataset, *words), script=SCRIPT).ok()
    assert words == SLIDER or done.losses[0] == 0.693, "the adapter changes nothing yet"


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("name", ["AuraFlowPipeline", "OvisImagePipeline", "SanaPipeline"])
def test_fifty_steps_overfit_one_image(name: str, tmp_path: Path, train: Train) -> None:
    build_tiny_pipeline(name).save_pretrained(tmp_path / "model")
    make_images(tmp_path / "data" / "8_thing", 1)
    validation = ["--validation_split", "0", "--max_train_steps", "50", "--network_dim", "8", "--network_alpha", "8"]
    done = train(arguments(tmp_path / "model", tmp_path, *validation), script=SCRIPT).ok()
    losses = [float(text) for text in re.findall(r"avr_loss=([\d.e+-]+)", done.stderr)]
    assert losses[-1] < 0.9 * losses[0], (losses[0], losses[-1])
