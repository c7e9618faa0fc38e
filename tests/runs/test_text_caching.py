"""Runs that free the text encoders before the denoiser is loaded, or cache a part of the captions."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from library.architectures.sd.assembly import build as build_sd
from library.checkpoints.headers import read_metadata
from library.checkpoints.weights import fingerprint
from library.memory.codecs.codec import RequestedFormat
from library.models.unet_loader import UnetLoader
from library.options.base import group
from library.options.caching import TextCachingOptions
from library.options.train import TrainOptions
from library.protocols import Architecture, TextCacheSpec
from library.training.command_line.cli import build_parser
from library.training.command_line.main import main
from library.training.loop.loop import loss_of
from tests.running import Finished, load_saved, make_images
from tests.tiny.bases import BASES

Run = Callable[[list[str]], tuple[Finished, list[float], int]]
"""Train; gives what the run left behind, the loss of every batch, and how often text encoders were loaded."""

CACHED = ["--network_train_unet_only", "--cache_text_encoder_outputs"]
ON_DISK = ["--network_train_unet_only", "--cache_text_encoder_outputs_to_disk"]


@dataclass(frozen=True)
class CachingOptions(TrainOptions):
    """Stable Diffusion 1.x with the options of models that support text caching."""

    text_caching: TextCachingOptions = group(TextCachingOptions)


@dataclass(frozen=True)
class CountingLoader:
    """A loader that records when text encoders are loaded."""

    loader: UnetLoader
    loads: list[int]

    def text_encoders(self) -> list[nn.Module]:
        self.loads.append(1)
        return self.loader.text_encoders()

    def vae(self) -> nn.Module:
        return self.loader.vae()

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        return self.loader.denoiser(weight_format)


def build_with(loads: list[int]) -> Callable[[CachingOptions], Architecture]:
    def build(options: CachingOptions) -> Architecture:
        arch = build_sd(options)
        loader = arch.load
        assert isinstance(loader, UnetLoader)

        def view(
            text_encoders: Sequence[nn.Module], denoiser: nn.Module
        ) -> tuple[nn.Module | list[nn.Module], nn.Module]:
            real, seen = arch.view(text_encoders or loader.text_encoders(), denoiser)
            return (real if text_encoders else []), seen

        spec = TextCacheSpec(
            options.text_caching,
            "_tiny_te.npz",
            ("hidden_state",),
            lambda: fingerprint(loader.parts.clips[0].weights),
            "",
            (),
        )
        return dataclasses.replace(arch, load=CountingLoader(loader, loads), view=view, text_cache=spec)

    return build


@pytest.fixture
def run(fresh_process: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def start(arguments: list[str]) -> tuple[Finished, list[float], int]:
        from accelerate.state import AcceleratorState, PartialState

        AcceleratorState._reset_state()
        PartialState._reset_state()
        capfd.readouterr()
        losses: list[float] = []
        loads: list[int] = []

        def noted(*args: object) -> torch.Tensor:
            loss = loss_of(*args)  # type: ignore[arg-type]
            losses.append(loss.item())
            return loss

        monkeypatch.setattr("library.training.loop.loop.loss_of", noted)
        status = main(build_parser(CachingOptions), CachingOptions, build_with(loads), arguments)
        out, err = capfd.readouterr()
        return Finished(status, out, err), losses, len(loads)

    return start


def weights_of(tmp_path: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "out" / f"{name}.safetensors")


def assert_equal_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


@pytest.mark.parametrize("precision", [pytest.param("no", marks=pytest.mark.nightly), "bf16"])
def test_memory_cache_disk_cache_and_no_cache_train_identically(
    run: Run, base_arguments: list[str], tmp_path: Path, images: Path, precision: str
) -> None:
    """Captions vary only by dropout, all runs start from the same weights, and the unconditional caption is cached."""
    run([*base_arguments, "--output_name", "start", "--network_train_unet_only", "--max_train_steps", "1"])
    start = ["--network_weights", str(tmp_path / "out" / "start.safetensors")]
    common = [*base_arguments, *start, "--mixed_precision", precision, "--caption_dropout_rate", "0.3"]
    common += ["--guidance_loss", "2", "--guidance_loss_caption", "two blurred dogs"]
    plain, losses, _ = run([*common, "--output_name", "plain", "--network_train_unet_only"])
    assert plain.status == 0, plain.stderr
    for name, options, loads in (("memory", CACHED, 1), ("disk", ON_DISK, 1), ("again", ON_DISK, 0)):
        done, cached_losses, num_loads = run([*common, "--output_name", name, *options])
        assert done.status == 0, done.stderr
        assert cached_losses == losses and num_loads == loads
        assert_equal_weights(weights_of(tmp_path, name), weights_of(tmp_path, "plain"))
    recorded = read_metadata(tmp_path / "out" / "plain.safetensors")
    assert (recorded["ss_guidance_loss"], recorded["ss_guidance_loss_caption"]) == ("2.0", "two blurred dogs")
    assert len(losses) == 4 and len(list((images / "2_thing").glob("0*_tiny_te.npz"))) == 6


def test_captions_still_vary_and_workers_do_not_change_results(
    run: Run, base_arguments: list[str], tmp_path: Path
) -> None:
    common = [*base_arguments, "--shuffle_caption", "--keep_tokens", "1", "--max_train_steps", "8"]
    _, fixed, _ = run([*base_arguments, *CACHED, "--max_train_steps", "8"])
    done, losses, _ = run([*common, *CACHED, "--output_name", "memory"])
    assert done.status == 0, done.stderr
    assert losses != fixed
    _, from_disk, _ = run([*common, *ON_DISK, "--output_name", "disk", "--max_data_loader_n_workers", "2"])
    assert from_disk == losses
    assert_equal_weights(weights_of(tmp_path, "memory"), weights_of(tmp_path, "disk"))


def test_a_resumed_run_equals_the_uninterrupted_one(run: Run, base_arguments: list[str], tmp_path: Path) -> None:
    common = [*base_arguments, *CACHED, "--shuffle_caption", "--caption_tag_dropout_rate", "0.3"]
    _, losses, _ = run([*common, "--max_train_steps", "7", "--save_state", "--save_every_n_steps", "3"])
    state = str(tmp_path / "out" / "mine-step00000003-state")
    done, resumed, _ = run([*common, "--max_train_steps", "7", "--resume", state, "--output_name", "resumed"])
    assert done.status == 0, done.stderr
    assert resumed == losses[3:]
    assert_equal_weights(weights_of(tmp_path, "resumed"), weights_of(tmp_path, "mine"))


def test_held_out_images_are_validated_from_the_cache(run: Run, base_arguments: list[str]) -> None:
    measured = []
    for options in (CACHED, ON_DISK):
        split = ["--validation_split", "0.4", "--validate_every_n_steps", "2"]
        done, _, _ = run([*base_arguments, *options, *split, "--shuffle_caption"])
        assert done.status == 0, done.stderr
        measured.append(re.findall(r"validation after step \d+: (?:loss )?[\d.]+", done.stderr + done.stdout))
    assert measured[0] == measured[1]
    assert len(measured[0]) == 2


def test_a_changed_text_encoder_is_noticed(
    run: Run, base_arguments: list[str], tiny_sd_folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    for file in tiny_sd_folder.rglob("*"):
        if file.is_file():
            (model / file.relative_to(tiny_sd_folder)).parent.mkdir(parents=True, exist_ok=True)
            (model / file.relative_to(tiny_sd_folder)).write_bytes(file.read_bytes())
    arguments = [*base_arguments, *ON_DISK, "--pretrained_model_name_or_path", str(model)]
    _, losses, _ = run(arguments)
    file = model / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors["text_model.final_layer_norm.weight"][3] *= 1.5
    save_file(tensors, file, {"format": "pt"})
    done, other, num_loads = run(arguments)
    assert num_loads == 1 and other != losses
    assert "7 made with other text encoders or settings" in done.stderr


def test_previews_are_drawn_without_text_encoders(run: Run, base_arguments: list[str], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat --n grass --l 3 --w 64 --h 64 --s 2 --d 1\n")
    previews = ["--sample_prompts", str(prompts), "--sample_every_n_steps", "4"]
    pixels = []
    for options, loads in ((CACHED, 1), (ON_DISK, 1), (ON_DISK, 0)):
        done, _, num_loads = run([*base_arguments, *previews, *options])
        assert done.status == 0 and num_loads == loads, done.stderr
        (image,) = (tmp_path / "out" / "sample").glob("*.png")
        pixels.append(image.read_bytes())
        image.unlink()
    assert len(set(pixels)) == 1


def refusal_message(run: Run, arguments: list[str]) -> str:
    done, losses, num_loads = run(arguments)
    assert (done.status, losses, num_loads) == (1, [], 0)
    return done.stderr


def test_base_weights_for_the_text_encoder_are_rejected(run: Run, base_arguments: list[str], tmp_path: Path) -> None:
    run([*base_arguments, "--output_name", "both"])
    message = refusal_message(
        run, [*base_arguments, *CACHED, "--base_weights", str(tmp_path / "out" / "both.safetensors")]
    )
    assert "both.safetensors changes the text encoder (lora_te_" in message and "merge_lora" in message
    run([*base_arguments, "--output_name", "unet", "--network_train_unet_only"])
    done, _, _ = run([*base_arguments, *CACHED, "--base_weights", str(tmp_path / "out" / "unet.safetensors")])
    assert done.status == 0, done.stderr


def test_third_party_networks_see_no_text_encoder(run: Run, base_arguments: list[str], tmp_path: Path) -> None:
    module = ["--network_module", "lycoris.kohya", "--network_args", "algo=lora", "preset=attn-mlp"]
    done, _, _ = run([*base_arguments, *CACHED, *module])
    assert done.status == 0, done.stderr
    assert all(name.startswith("lora_unet_") for name in weights_of(tmp_path, "mine"))


# Training some text encoders while caching the outputs of the others.

PartialRun = Callable[..., Finished]
PARTLY_CACHED, PARTLY_ON_DISK = "--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk"


@pytest.fixture
def run_partly(train: Callable[..., Finished], tmp_path: Path) -> PartialRun:
    """Return `run(base, name, ...)`, which trains two steps of one image and writes `name`.safetensors."""
    make_images(tmp_path / "data" / "1_thing", 3, seed=63)
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    models: dict[str, list[str]] = {}

    def start(name: str, output: str, *more: str) -> Finished:
        base = BASES[name]
        model = models.get(name) or models.setdefault(name, base.build(tmp_path / name))
        return train([
            *model, "--train_data_dir", str(tmp_path / "data"), "--caption_extension", ".txt", "--resolution", "64",
            "--output_dir", str(tmp_path / "out"), "--output_name", output, "--network_module", base.module,
            "--network_dim", "4", "--learning_rate", "1e-2", "--seed", "5", "--max_data_loader_n_workers", "0",
            "--max_train_steps", "2", "--caption_dropout_rate", "0.3", *more,
        ], script=base.script)  # fmt: skip

    return start


def images_of(tmp_path: Path, name: str) -> list[bytes]:
    return [Image.open(path).tobytes() for path in sorted((tmp_path / "out" / "sample").glob(f"{name}_*.png"))]


@pytest.mark.parametrize(
    ("name", "trained", "extra"),
    [
        ("flux", {"te1"}, []),
        pytest.param("sd3", {"te1", "te2"}, [], marks=pytest.mark.nightly),
        pytest.param("flux", set(), ["--text_encoder_lr", "0"], marks=pytest.mark.nightly),
    ],
)
def test_the_adapter_equals_that_of_a_run_without_caches_bit_for_bit(
    run_partly: PartialRun, tmp_path: Path, name: str, trained: set[str], extra: list[str]
) -> None:
    """Validation and previews agree too, as the trained encoder's features include its adapter."""
    looks = [
        "--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2", "--validation_split", "0.4",
        "--validate_every_n_steps", "2", *extra,
    ]  # fmt: skip
    runs = {"plain": [], "memory": [PARTLY_CACHED], "disk": [PARTLY_ON_DISK]}
    measured = {}
    for output, more in runs.items():
        done = run_partly(name, output, *looks, *more).ok()
        measured[output] = [line.split("loss")[1] for line in done.stderr.splitlines() if "validation after" in line]
    plain = load_saved(tmp_path, "plain")
    learned = {key.split("_")[1] for key, tensor in plain.items() if "lora_up" in key and tensor.abs().max() > 0}
    assert learned == {*trained, "unet"}
    for output in ("memory", "disk"):
        actual = load_saved(tmp_path, output)
        assert actual.keys() == plain.keys() and all(torch.equal(actual[key], plain[key]) for key in plain)
        assert measured[output] == measured["plain"] != []
        assert images_of(tmp_path, output) == images_of(tmp_path, "plain") != []


@pytest.mark.nightly
def test_the_disk_cache_serves_runs_that_train_only_the_denoiser(run_partly: PartialRun, tmp_path: Path) -> None:
    """The files contain the features of all untrained encoders."""
    assert run_partly("flux", "both", PARTLY_ON_DISK).status == 0
    done = run_partly("flux", "again", PARTLY_ON_DISK)
    assert done.status == 0 and "0 to encode, 0 stale" in done.stderr
    both, again = load_saved(tmp_path, "both"), load_saved(tmp_path, "again")
    assert all(torch.equal(both[key], again[key]) for key in both)
    done = run_partly("flux", "alone", PARTLY_ON_DISK, "--network_train_unet_only")
    assert done.status == 0 and "0 to encode, 0 stale" in done.stderr
    assert run_partly("flux", "fresh", PARTLY_CACHED, "--network_train_unet_only").status == 0
    alone, fresh = load_saved(tmp_path, "alone"), load_saved(tmp_path, "fresh")
    assert all(torch.equal(alone[key], fresh[key]) for key in fresh) and not any("lora_te" in key for key in alone)


def test_lumina_has_only_the_trained_encoder(run_partly: PartialRun, tmp_path: Path) -> None:
    assert run_partly("lumina", "plain").status == 0
    done = run_partly("lumina", "cached", PARTLY_ON_DISK).ok()
    assert "--cache_text_encoder_outputs has no effect: every text encoder trains" in done.stderr
    plain, cached = load_saved(tmp_path, "plain"), load_saved(tmp_path, "cached")
    assert all(torch.equal(plain[key], cached[key]) for key in plain)
    assert not list((tmp_path / "data").rglob("*_te.npz"))


def test_encoders_without_adapters_may_all_be_freed(run_partly: PartialRun, tmp_path: Path) -> None:
    assert run_partly("hunyuan_image", "alone", PARTLY_CACHED, "--network_train_unet_only").status == 0
    run_partly("hunyuan_image", "cached", PARTLY_CACHED).ok()
    alone, cached = load_saved(tmp_path, "alone"), load_saved(tmp_path, "cached")
    assert all(torch.equal(alone[key], cached[key]) for key in alone)
