"""Programs that import the scripts and library of sd-scripts, each in its own way."""

import argparse
import hashlib
import logging
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import anima_train_network
import flux_train_network
import hunyuan_image_train_network
import lumina_train_network
import sd3_train_network
import sdxl_train_network
import train_network
from library import args as args_util
from library import (
    compile_utils,
    flux_train_utils,
    huggingface_util,
    model_util,
    qwen_image_autoencoder_kl_2d,
    sdxl_model_util,
    train_util,
    utils,
)
from library.architectures.flux.options import FluxOptions
from library.base.errors import UserError
from library.checkpoints.headers import read_metadata
from library.models.vae.qwen_image_2d import ImageConv
from library.training.command_line.replaced import NEVER_CALLED
from tests.running import ROOT, make_images
from tests.tiny.bases import BASES
from tests.unit.training.test_hub import FolderHub, hub  # noqa: F401

TRAINERS: dict[str, Any] = {
    "sd": (train_network, train_network.NetworkTrainer),
    "sdxl": (sdxl_train_network, sdxl_train_network.SdxlNetworkTrainer),
    "flux": (flux_train_network, flux_train_network.FluxNetworkTrainer),
    "sd3": (sd3_train_network, sd3_train_network.Sd3NetworkTrainer),
    "lumina": (lumina_train_network, lumina_train_network.LuminaNetworkTrainer),
    "hunyuan_image": (hunyuan_image_train_network, hunyuan_image_train_network.HunyuanImageNetworkTrainer),
    "anima": (anima_train_network, anima_train_network.AnimaNetworkTrainer),
}


def settings(tmp_path: Path, **more: Any) -> dict[str, Any]:
    """Return settings for two steps on images of 64 pixels."""
    if not (tmp_path / "data").exists():
        make_images(tmp_path / "data" / "1_thing", 2)
    return {
        "train_data_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out"), "output_name": "mine",
        "resolution": "64,64", "caption_extension": ".txt", "network_module": "networks.lora", "network_dim": 2,
        "network_alpha": 2, "learning_rate": 1e-3, "max_train_steps": 2, "seed": 42, "max_data_loader_n_workers": 0,
        **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["sd", *(pytest.param(name, marks=pytest.mark.nightly) for name in TRAINERS if name != "sd")]
)
def test_a_trainer_class_gives_the_same_result_as_its_script(
    tmp_path: Path, fresh_process: None, name: str, train: Any, tiny_sd_folder: Path
) -> None:
    script, trainer = TRAINERS[name]
    words = (
        BASES[name].build(tmp_path / "base")
        if name in BASES
        else ["--pretrained_model_name_or_path", str(tiny_sd_folder)]
    )
    args = script.setup_parser().parse_args(words)
    for key, value in settings(tmp_path).items():
        setattr(args, key, value)
    assert trainer().train(args) is None
    typed = [
        word for key, value in settings(tmp_path, output_name="typed").items() for word in (f"--{key}", str(value))
    ]
    assert train([*words, *typed], script.__name__).status == 0
    actual, expected = load_file(tmp_path / "out/mine.safetensors"), load_file(tmp_path / "out/typed.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


@pytest.mark.slow
def test_coppylora_trains_in_a_thread(
    tmp_path: Path, fresh_process: None, monkeypatch: pytest.MonkeyPatch, tiny_sdxl_folder: Path
) -> None:
    """CoppyLoRA parses its own command line, reads no config file and sets attributes of the namespace."""
    monkeypatch.setattr(sys, "argv", ["CoppyLora_webUI.py"])
    parser = sdxl_train_network.setup_parser()
    args = parser.parse_args()
    sdxl_train_network.train_util.verify_command_line_training_args(args)
    args = sdxl_train_network.train_util.read_config_from_file(args, parser)
    wanted = settings(
        tmp_path, pretrained_model_name_or_path=str(tiny_sdxl_folder), sdpa=True, enable_bucket=True,
        bucket_no_upscale=True, min_bucket_reso=64, max_bucket_reso=1024, network_train_unet_only=True,
        no_half_vae=True, cache_latents=True, cache_latents_to_disk=True, cache_text_encoder_outputs=True,
        lr_scheduler="constant", cache_text_encoder_outputs_to_disk=True, persistent_data_loader_workers=True,
        lr_scheduler_num_cycles=4, save_model_as="safetensors", save_precision="fp16", optimizer_type="AdamW",
        sdxl=True, skip_existing=True,
    )  # fmt: skip
    for key, value in vars(argparse.Namespace(**wanted)).items():
        setattr(args, key, value)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            sdxl_train_network.SdxlNetworkTrainer().train(args)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []
    assert read_metadata(tmp_path / "out" / "mine.safetensors")["ss_lr_scheduler"] == "constant"
    assert len(list((tmp_path / "data/1_thing").glob("0*.npz"))) == 4


@pytest.mark.slow
def test_a_second_run_in_one_process_may_use_another_precision(
    tmp_path: Path, fresh_process: None, tiny_sd_folder: Path
) -> None:
    """A front end runs a matrix of settings; some options are missing or None, sizes are pairs."""
    for precision in ("no", "bf16"):
        wanted = settings(tmp_path, output_name=precision, mixed_precision=precision, resolution=(64, 64), vae=None)
        args = argparse.Namespace(pretrained_model_name_or_path=tiny_sd_folder, **wanted)
        train_network.NetworkTrainer().train(args)
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == {"no.safetensors", "bf16.safetensors"}


def test_errors_that_end_a_run_are_raised(tmp_path: Path, fresh_process: None, tiny_sd_folder: Path) -> None:
    wanted = settings(tmp_path, pretrained_model_name_or_path=str(tiny_sd_folder))
    for broken, sentence in (
        ({"network_module": None}, "--network_module is not set"),
        ({"pretrained_model_name_or_path": str(tmp_path / "none.safetensors")}, "does not exist"),
        ({"max_train_steps": "many"}, 'max_train_steps is "many", but --max_train_steps takes a whole number'),
    ):
        with pytest.raises(UserError, match=sentence):
            train_network.NetworkTrainer().train(argparse.Namespace(**{**wanted, **broken}))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.safetensors"))


def test_the_process_command_line_overrides_a_config_file(
    tmp_path: Path, fresh_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.toml").write_text("[any]\nnetwork_dim = 8\nseed = 3\n")
    monkeypatch.setattr(sys, "argv", ["x", "--config_file", str(tmp_path / "config.toml"), "--seed", "5"])
    parser = train_network.setup_parser()
    args = train_network.train_util.read_config_from_file(parser.parse_args(), parser)
    assert (args.network_dim, args.seed) == (8, 5)


def test_secrets_on_the_command_line_are_warned_about_if_a_tracker_logs_it(caplog: pytest.LogCaptureFixture) -> None:
    parser = train_network.setup_parser()
    train_util.verify_command_line_training_args(parser.parse_args(["--huggingface_token", "hf_x"]))
    assert not caplog.records
    train_util.verify_command_line_training_args(
        parser.parse_args(["--huggingface_token", "hf_x", "--log_with", "wandb"])
    )
    assert "--huggingface_token: wandb may publish the command line" in caplog.text
    assert "hf_x" not in caplog.text


def test_data_options_become_pairs() -> None:
    words = ["--resolution", "512", "--face_crop_aug_range", "2.0,4.0", "--caption_extention", ".txt"]
    args = train_network.setup_parser().parse_args(words)
    train_util.prepare_dataset_args(args, True)
    assert (args.resolution, args.face_crop_aug_range, args.caption_extension) == ((512, 512), (2.0, 4.0), ".txt")


@pytest.mark.parametrize("no_upscale", [True, False])
def test_images_are_sorted_into_buckets_as_before_caching(no_upscale: bool) -> None:
    """Programs that cache latents crop every image to its bucket and never enlarge it after resizing."""
    manager = train_util.BucketManager(no_upscale, (512, 512), 256, 1024, 64)
    if not no_upscale:
        manager.make_buckets()
        assert (512, 512) in manager.predefined_resos and (256, 1024) in manager.predefined_resos
    sizes = [(1000, 400), (300, 1200), (640, 640), (512, 512)]
    for number, (width, height) in enumerate(sizes):
        reso, resized, ar_error = manager.select_bucket(width, height)
        assert all(side % 64 == 0 for side in reso) and reso[0] * reso[1] <= 512 * 512
        assert resized[0] >= reso[0] and resized[1] >= reso[1] and abs(ar_error) < 1
        manager.add_image(reso, (number, np.zeros((*reso[::-1], 3))))
    manager.sort()
    assert manager.resos == sorted(manager.resos)
    buckets = {
        number: reso for reso, bucket in zip(manager.resos, manager.buckets, strict=True) for number, _ in bucket
    }
    assert buckets.keys() == {0, 1, 2, 3} and buckets[3] == (512, 512)


def test_hash_functions_match_the_metadata_of_saved_files(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(300_000, generator=torch.Generator().manual_seed(4))}
    model_hash, legacy_hash = train_util.precalculate_safetensors_hashes(tensors, {"ss_seed": "1"})
    save_file(tensors, tmp_path / "x.safetensors", {"ss_seed": "1"})
    data = (tmp_path / "x.safetensors").read_bytes()
    assert legacy_hash == hashlib.sha256(data[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    assert model_hash == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def test_lora_forge_finds_what_its_guard_looks_for() -> None:
    # A file that must exist, and the text that it must have, where git does not know the scripts' commits.
    words = ("--show_timesteps", "--block_swap_h2d_only", "--use_pinned_memory_for_block_swap")
    marks = [
        ("compile_utils", ""),
        ("qwen_image_autoencoder_kl_2d", ""),
        *(("args", f'"{word}"') for word in words),
        ("flux_train_utils", "timestep_sampling_offset"),
    ]
    for name, text in marks:
        assert text in (ROOT / f"library/{name}.py").read_text(encoding="utf-8")
    parser = argparse.ArgumentParser()
    compile_utils.add_compile_arguments(parser)
    assert parser.parse_args(["--compile"]).compile
    assert args_util.read_config_from_file is train_util.read_config_from_file
    assert flux_train_utils.timestep_sampling_offset({"timestep_sampling": {"offset": 0.3}}) == 0.3


def test_the_vae_for_images_is_loaded_by_its_file(tmp_path: Path) -> None:
    words = BASES["anima"].build(tmp_path)
    vae = qwen_image_autoencoder_kl_2d.load_vae(words[words.index("--vae") + 1], device="cpu", disable_mmap=True)
    assert any(isinstance(layer, ImageConv) for layer in vae.modules())
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}


def test_fluxgym_adds_the_options_of_flux_to_the_common_parser() -> None:
    parser = train_network.setup_parser()
    flux_train_utils.add_flux_train_arguments(parser)
    dests = [action.dest for action in parser._actions]
    assert set(FluxOptions.defaults()) <= set(dests) and len(dests) == len(set(dests))
    args = parser.parse_args(["--guidance_scale", "1.0", "--timestep_sampling", "shift", "--resolution", "512"])
    assert (args.guidance_scale, args.timestep_sampling, args.resolution) == (1.0, "shift", "512")
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_fluxgym_uploads_a_folder_to_the_top_of_its_repository(tmp_path: Path, hub: type[FolderHub], kind: str) -> None:  # noqa: F811
    source = tmp_path / "my-lora"
    source.mkdir()
    (source / "my-lora.safetensors").write_bytes(b"weights")
    hub.root.mkdir()
    args = argparse.Namespace(
        huggingface_repo_id="me/cat",
        huggingface_repo_type="model",
        huggingface_repo_visibility="private",
        huggingface_path_in_repo="",
        huggingface_token="secret",
        async_upload=False,
    )
    if kind == "file":
        huggingface_util.upload(args, str(source / "my-lora.safetensors"), "/my-lora.safetensors")
    else:
        huggingface_util.upload(args=args, src=str(source))
    assert (hub.root / "me/cat/my-lora.safetensors").read_bytes() == b"weights"
    assert hub.made == {"me/cat": True}


def test_logging_is_set_up_once_and_again_on_request(tmp_path: Path, fresh_process: None) -> None:
    root = logging.getLogger()
    before = list(root.handlers)
    utils.setup_logging()
    assert root.handlers == before  # pytest's handlers are there
    utils.setup_logging(argparse.Namespace(console_log_file=str(tmp_path / "log.txt")), log_level="DEBUG", reset=True)
    logging.getLogger("library").debug("seen")
    assert "seen" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_lycoris_extracts_from_models_that_the_library_loads(
    name: str, tmp_path: Path, tiny_sd_folder: Path, tiny_sdxl_folder: Path
) -> None:
    """Extract as tools/lycoris_locon_extract.py of kohya_ss does."""
    from lycoris.utils import extract_diff

    folder = tiny_sd_folder if name == "sd" else tiny_sdxl_folder
    changed, component, layer, key = tmp_path / "changed", *CHANGED[name]
    shutil.copytree(folder, changed)
    (file,) = (changed / component).glob("*.safetensors")
    weights = load_file(file)
    change = torch.randn(weights[layer].shape[0], 1) @ torch.randn(1, weights[layer].shape[1])
    save_file({**weights, layer: weights[layer] + change}, file)

    base, tuned = load(name, folder), load(name, changed)
    extracted = extract_diff(*base[:1], *tuned[:1], *base[1:], *tuned[1:], "fixed", 1, 1, "cpu", small_conv=False)
    product = extracted[f"{key}.lora_up.weight"].float() @ extracted[f"{key}.lora_down.weight"].float()
    torch.testing.assert_close(product, change, atol=2e-3, rtol=2e-2)  # LyCORIS stores half precision


CHANGED = {
    "sd": ("text_encoder", "text_model.encoder.layers.1.mlp.fc1.weight", "lora_te_text_model_encoder_layers_1_mlp_fc1"),
    "sdxl": (
        "unet",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ),
}


def load(name: str, folder: Path) -> tuple[list[torch.nn.Module], torch.nn.Module]:
    if name == "sd":
        text_encoder, vae, unet = model_util.load_models_from_stable_diffusion_checkpoint(False, str(folder))
        encoders = [text_encoder]
    else:
        clip_l, clip_g, vae, unet, *_ = sdxl_model_util.load_models_from_sdxl_checkpoint(None, str(folder), "cpu")
        encoders = [clip_l, clip_g]
    assert next(vae.parameters()).dtype == torch.float32
    return encoders, unet


# Programs that replace methods of the trainers, as forks and plug-ins of sd-scripts do.

MISSING = "No data found: --train_data_dir none does not exist"
ARGS = {"pretrained_model_name_or_path": "owner/none", "train_data_dir": "none", "output_dir": "none"}


def start_error(trainer: Any) -> str:
    """Call `train` without a resolution and return the error message."""
    with pytest.raises(UserError) as refused:
        trainer.train(argparse.Namespace(**ARGS))
    return str(refused.value)


class WithImages(flux_train_network.FluxNetworkTrainer):
    """A plug-in with its own loss and previews."""

    def sample_images(self, *args: Any) -> None: ...

    def get_noise_pred_and_target(self, *args: Any) -> None: ...

    def post_process_network(self, *args: Any) -> None: ...


class WithOwnMethods(flux_train_network.FluxNetworkTrainer):
    """A program that wraps training with its own steps."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_folders(self) -> None:
        self.calls.append("before")

    def train(self, args: argparse.Namespace) -> None:
        self.prepare_folders()
        super().train(args)


def test_overriding_methods_that_are_never_called_is_rejected_with_an_alternative() -> None:
    message = start_error(WithImages())
    assert (
        "this program replaces methods of WithImages that are never called here: sample_images (--log_events" in message
    )
    assert "get_noise_pred_and_target (a base model is a package" in message
    assert "post_process_network (--network_module takes your own module" in message


def test_additional_methods_and_a_wrapped_train_work(fresh_process: None) -> None:
    trainer = WithOwnMethods()
    assert MISSING in start_error(trainer)
    assert trainer.calls == ["before"]


@pytest.mark.parametrize("name", TRAINERS)
def test_methods_replaced_on_the_base_trainer_count_for_all(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A program replaces the previews of NetworkTrainer and trains SDXL."""
    monkeypatch.setattr(train_network.NetworkTrainer, "sample_images", lambda *args: None, raising=False)
    assert "never called here: sample_images" in start_error(TRAINERS[name][1]())


@pytest.mark.parametrize("method", [method for methods in NEVER_CALLED.values() for method in methods])
def test_every_method_in_the_table_is_rejected(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    trainer = sdxl_train_network.SdxlNetworkTrainer()
    assert not {method} & set(dir(trainer)), "it is there, and called"
    monkeypatch.setattr(trainer, method, lambda *args: None, raising=False)
    assert f"never called here: {method} (" in start_error(trainer)


def test_replacing_a_module_function_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, fresh_process: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert MISSING in start_error(train_network.NetworkTrainer())
    assert "has no effect: nothing here uses it" not in caplog.text
    monkeypatch.setattr(train_util, "sample_images_common", print, raising=False)
    monkeypatch.setattr(train_util, "BucketManager", object)
    assert MISSING in start_error(train_network.NetworkTrainer())
    assert "sets BucketManager, sample_images_common of library.train_util, which has no effect" in caplog.text
