"""What the trainer offers for every base model works for a measured pipeline too."""

import re
from pathlib import Path

import pytest

from tests.any_pipeline.test_training import SCRIPT, Train, arguments, same
from tests.running import make_images
from tests.runs.test_pairs import PREFERENCES, SLIDER, write_dataset
from tests.tiny.pipelines import build_tiny_pipeline

pytestmark = pytest.mark.slow


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
