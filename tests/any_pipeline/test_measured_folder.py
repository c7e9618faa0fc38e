"""A folder is measured on one block of each list of its denoiser, and trains with every feature."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from library.architectures.any_pipeline import folder as folders
from library.architectures.any_pipeline.assembly import measure_folder
from library.architectures.any_pipeline.convention import Convention
from library.architectures.any_pipeline.folder import (
    PipelineFolder,
    load_for_measuring,
    load_shortened,
    load_streamed,
    open_folder,
)
from library.architectures.any_pipeline.measuring import measure
from library.architectures.any_pipeline.targets import block_lists
from library.architectures.any_pipeline.trees import join_values
from tests.any_pipeline.test_convention import SIZE, measured
from tests.any_pipeline.test_training import SCRIPT, Train, arguments, same
from tests.running import make_images
from tests.runs.test_pairs import PREFERENCES, SLIDER, write_dataset
from tests.tiny.pipelines import PIPELINES, build_tiny_pipeline, watch_pipeline

pytestmark = pytest.mark.slow


def values_of(convention: Convention) -> dict[str, Any]:
    values = {f.name: getattr(convention, f.name) for f in fields(convention)}
    for name in ("takes_batches", "pads", "output", "memory"):  # compared by other tests
        del values[name]
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_one_block_of_each_list_gives_the_convention_of_all(name: str, tmp_path: Path) -> None:
    pipe = build_tiny_pipeline(name)
    pipe.save_pretrained(tmp_path / "model")
    folder = open_folder(str(tmp_path / "model"), trusts_code=False)
    of_few = measure_folder(folder, folder.build_stage(), "no")
    of_all, _ = measure(watch_pipeline(pipe), SIZE)
    assert values_of(of_few) == values_of(of_all)


def test_a_denoiser_is_shortened_to_the_first_block_of_each_list(tmp_path: Path) -> None:
    pipe = build_tiny_pipeline("AuraFlowPipeline")
    pipe.save_pretrained(tmp_path / "model")
    short: Any = load_shortened(open_folder(str(tmp_path / "model"), False), "transformer")
    whole = pipe.transformer.single_transformer_blocks
    assert len(whole) == 4 and len(short.single_transformer_blocks) == 1
    pairs = zip(short.single_transformer_blocks[0].parameters(), whole[0].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_streamed_denoiser_holds_one_block_at_a_time_and_gives_the_same(tmp_path: Path) -> None:
    name = "AuraFlowPipeline"
    pipe = build_tiny_pipeline(name)
    pipe.save_pretrained(tmp_path / "model")
    _, convention, maps = measured(name)
    streamed: Any = load_streamed(open_folder(str(tmp_path / "model"), False), convention.denoiser)
    blocks = [block for blocks in block_lists(streamed) for block in blocks]
    in_memory = []

    def count(*_: Any) -> None:
        in_memory.append(sum(not next(block.parameters()).is_meta for block in blocks))

    for block in blocks:
        block.register_forward_pre_hook(count)
    with torch.no_grad():
        outputs = [join_values(model(**maps.kwargs)) for model in (streamed, pipe.transformer)]
    assert torch.equal(*outputs)
    assert in_memory == [1] * len(blocks) and len(blocks) == 6
    assert all(parameter.is_meta for block in blocks for parameter in block.parameters())


def test_large_text_encoders_are_in_memory_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_tiny_pipeline("FluxPipeline").save_pretrained(tmp_path / "model")
    folder = open_folder(str(tmp_path / "model"), trusts_code=False)
    watched, most, loaded, load = folder.build_stage(), [0], set[str](), PipelineFolder.load

    def note(self: PipelineFolder, name: str, dtype: torch.dtype) -> Any:
        model = load(self, name, dtype)
        loaded.add(name)
        most.append(len(watched.models.keys() & {"text_encoder", "text_encoder_2"}))
        return model

    monkeypatch.setattr(PipelineFolder, "load", note)
    monkeypatch.setattr(folders, "MOST_TEXT_BYTES", 0)
    one_by_one = measure_folder(folder, watched, "no")
    assert max(most) == 0 and loaded >= {"text_encoder", "text_encoder_2"}  # beside the one that is loaded
    monkeypatch.undo()
    assert values_of(one_by_one) == values_of(measure_folder(folder, folder.build_stage(), "no"))


def test_a_measurement_reads_text_encoders_when_they_are_called(tmp_path: Path) -> None:
    build_tiny_pipeline("FluxPipeline").save_pretrained(tmp_path / "model")
    assert load_for_measuring(open_folder(str(tmp_path / "model"), False)).keys() == {"transformer", "vae"}


def test_a_folder_of_half_precision_files_alone_is_measured(tmp_path: Path) -> None:
    build_tiny_pipeline("FluxPipeline").save_pretrained(tmp_path / "model", variant="fp16")
    folder = open_folder(str(tmp_path / "model"), trusts_code=False)
    assert measure_folder(folder, folder.build_stage(), "no").denoiser == "transformer"


# What the trainer offers for every base model works for a measured pipeline too.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "auraflow"
    build_tiny_pipeline("AuraFlowPipeline").save_pretrained(folder)
    return folder


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


@pytest.mark.parametrize("base_format", ["int8", "nf4"])
def test_the_base_can_be_stored_in_few_bits(base_format: str, model: Path, tmp_path: Path, train: Train) -> None:
    plain = train(arguments(model, tmp_path), script=SCRIPT)
    done = train(arguments(model, tmp_path, "--base_format", base_format), script=SCRIPT).ok()
    assert re.search(rf"denoiser: \d+ layers in {base_format}", done.stderr)
    assert first_loss(done.stderr) == pytest.approx(first_loss(plain.stderr), rel=0.1)


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


@pytest.mark.parametrize(
    "module",
    ["networks.loha", "networks.lokr", "networks.dylora", "networks.oft", "networks.lora_fa", "networks.tlora"],
)
def test_other_kinds_of_adapters_train(module: str, model: Path, tmp_path: Path, train: Train) -> None:
    train(arguments(model, tmp_path, "--network_module", module), script=SCRIPT).ok()


def test_memory_is_planned(model: Path, tmp_path: Path, train: Train) -> None:
    train(arguments(model, tmp_path, "--fit", "8GB"), script=SCRIPT).ok()


@pytest.mark.parametrize("words", [PREFERENCES, SLIDER], ids=" ".join)
def test_pairs_of_images_train(words: tuple[str, str], model: Path, tmp_path: Path, train: Train) -> None:
    make_images(tmp_path / "preferred", 3, seed=4)
    make_images(tmp_path / "rejected", 3, side=96, seed=5)
    write_dataset(tmp_path, "")
    dataset = ["--train_data_dir", "", "--dataset_config", str(tmp_path / "data.toml")]
    done = train(arguments(model, tmp_path, *dataset, *words), script=SCRIPT).ok()
    assert words == SLIDER or done.losses[0] == 0.693, "the adapter changes nothing yet"


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["AuraFlowPipeline", "OvisImagePipeline", "SanaPipeline"])
def test_fifty_steps_overfit_one_image(name: str, tmp_path: Path, train: Train) -> None:
    build_tiny_pipeline(name).save_pretrained(tmp_path / "model")
    make_images(tmp_path / "data" / "8_thing", 1)
    validation = ["--validation_split", "0", "--max_train_steps", "50", "--network_dim", "8", "--network_alpha", "8"]
    done = train(arguments(tmp_path / "model", tmp_path, *validation), script=SCRIPT).ok()
    losses = [float(text) for text in re.findall(r"avr_loss=([\d.e+-]+)", done.stderr)]
    assert losses[-1] < 0.9 * losses[0], (losses[0], losses[-1])
