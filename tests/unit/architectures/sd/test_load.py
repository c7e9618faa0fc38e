"""Loading SD 1.x: every file format gives the same weights, and others are refused."""

import json
import logging
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from library.protocols import Architecture
from library.types import Noised
from tests.tiers import first_is_fast
from tests.tiny.sd import build_tiny_sd
from tests.tolerances import FLOAT32_DEEP


def compute_outputs(arch: Architecture) -> dict[str, Tensor]:
    """Return the outputs of each of the three models for fixed inputs."""
    generator = torch.Generator().manual_seed(31)
    pixels_BCHW = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=generator)
    conditioning = arch.text.encode(arch.load.text_encoders(), arch.text.tokenize(["a red cat", "and a dog, (dry)"]))
    vae = arch.load.vae()
    noised = Noised(latents_BCHW, latents_BCHW, latents_BCHW, torch.ones(2), torch.tensor([17, 801]))
    with torch.no_grad():
        return {
            **conditioning,
            "encoded": arch.codec.encode(vae, pixels_BCHW, [torch.Generator().manual_seed(i) for i in (5, 6)]),
            "decoded": arch.codec.decode(vae, latents_BCHW),
            "prediction": arch.predict(arch.load.denoiser(), noised, conditioning, None),
        }


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_single_file_matches_the_folder_bit_for_bit(open_sd, tiny_sd_folder, tiny_sd_file):
    assert_same(compute_outputs(open_sd(tiny_sd_file)), compute_outputs(open_sd(tiny_sd_folder)))


def test_a_ckpt_matches_the_folder_bit_for_bit(open_sd, tiny_sd_folder, tmp_path):
    assert_same(compute_outputs(open_sd(build_tiny_sd(tmp_path, 11, "ckpt"))), compute_outputs(open_sd(tiny_sd_folder)))


def test_a_ckpt_written_by_torch_before_1_6_loads(open_sd, tiny_sd_file, tmp_path):
    shutil.copytree(tiny_sd_file.parent / "tokenizer", tmp_path / "tokenizer")
    torch.save(load_file(tiny_sd_file), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert_same(compute_outputs(open_sd(tmp_path / "old.ckpt")), compute_outputs(open_sd(tiny_sd_file)))


def test_outputs_have_the_expected_shapes_and_scale(open_sd, tiny_sd_folder):
    outputs = compute_outputs(open_sd(tiny_sd_folder))
    assert 0.2 < outputs["prediction"].std() < 3
    assert outputs["hidden_state"].shape == (2, 77, 32)
    assert outputs["encoded"].shape == (2, 4, 8, 8)
    assert outputs["decoded"].shape == (2, 3, 64, 64)


@pytest.mark.parametrize("variant", first_is_fast(["fp16.safetensors", "bin", "sharded"]))
def test_a_folder_loads_with_every_format_of_its_weights(open_sd, tiny_sd_folder, tmp_path, variant):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd_folder, folder)
    for part, stem, pickled in (
        ("unet", "diffusion_pytorch_model", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model", "diffusion_pytorch_model"),
        ("text_encoder", "model", "pytorch_model"),
    ):
        file = folder / part / f"{stem}.safetensors"
        tensors = load_file(file)
        file.unlink()
        if variant == "bin":
            torch.save(tensors, folder / part / f"{pickled}.bin")
        elif variant == "sharded":
            names = sorted(tensors)
            halves = {f"{stem}-{i + 1:05}-of-00002.safetensors": names[i::2] for i in range(2)}
            for shard, keys in halves.items():
                save_file({key: tensors[key] for key in keys}, folder / part / shard)
            weight_map = {key: shard for shard, keys in halves.items() for key in keys}
            (folder / part / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        else:
            save_file(tensors, folder / part / f"{stem}.{variant}")
    assert_same(compute_outputs(open_sd(folder)), compute_outputs(open_sd(tiny_sd_folder)))


def test_text_encoder_names_may_lack_text_model(open_sd, tiny_sd_file, tmp_path):
    shutil.copytree(tiny_sd_file.parent / "tokenizer", tmp_path / "tokenizer")
    tensors = {k.replace("transformer.text_model.", "transformer."): v for k, v in load_file(tiny_sd_file).items()}
    save_file(tensors, tmp_path / "short.safetensors")
    assert_same(compute_outputs(open_sd(tmp_path / "short.safetensors")), compute_outputs(open_sd(tiny_sd_file)))


def test_ema_weights_buffers_and_2d_vae_attention_change_nothing(open_sd, tiny_sd_file, tmp_path, caplog):
    """Real checkpoints also contain EMA weights, the noise schedule, position ids and 2-D attention weights."""
    shutil.copytree(tiny_sd_file.parent / "tokenizer", tmp_path / "tokenizer")
    tensors = load_file(tiny_sd_file)
    tensors = {k: v.squeeze() if ".attn_1." in k and v.ndim == 4 else v for k, v in tensors.items()}
    tensors["model_ema.diffusion_modelinput_blocks00weight"] = torch.randn(3)
    tensors["betas"] = torch.randn(1000)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None] + 5
    save_file(tensors, tmp_path / "extra.safetensors")
    with caplog.at_level(logging.WARNING):
        assert_same(compute_outputs(open_sd(tmp_path / "extra.safetensors")), compute_outputs(open_sd(tiny_sd_file)))
    assert [r.message for r in caplog.records if "library" in r.name] == []


def test_unknown_unet_weights_are_warned_about_by_name(open_sd, tiny_sd_file, tmp_path, caplog):
    shutil.copytree(tiny_sd_file.parent / "tokenizer", tmp_path / "tokenizer")
    save_file(
        {**load_file(tiny_sd_file), "model.diffusion_model.new_gate.weight": torch.randn(2)}, tmp_path / "m.safetensors"
    )
    with caplog.at_level(logging.WARNING):
        open_sd(tmp_path / "m.safetensors").load.denoiser()
    assert "new_gate.weight" in caplog.text


@pytest.mark.parametrize("layout", first_is_fast(["ldm", "prefixed", "diffusers", "folder", "diffusers before 0.12"]))
def test_another_vae_replaces_that_of_the_checkpoint(open_sd, tiny_sd_folder, tmp_path, layout):
    """Load the VAE of a model with another seed in each form that --vae accepts."""
    other = build_tiny_sd(tmp_path / "folder", 12)
    single = {k: v for k, v in load_file(build_tiny_sd(tmp_path / "file", 12, "safetensors")).items()}
    prefix = "first_stage_model."
    vae = {k.removeprefix(prefix): v for k, v in single.items() if k.startswith(prefix)}
    path = tmp_path / "vae.safetensors"
    if layout == "ldm":
        save_file({**vae, "loss.discriminator.main.0.weight": torch.randn(2)}, path)
    elif layout == "prefixed":
        save_file({prefix + k: v for k, v in vae.items()}, path)
    elif layout == "folder":
        path = other / "vae"
    else:
        tensors = load_file(other / "vae" / "diffusion_pytorch_model.safetensors")
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        if layout != "diffusers":
            for new, name in old.items():
                tensors = {k.replace(f".{new}.", f".{name}."): v for k, v in tensors.items()}
            assert any(".proj_attn." in k for k in tensors)
        save_file(tensors, path)
    actual = open_sd(tiny_sd_folder, vae=str(path)).load.vae().state_dict()
    expected = open_sd(other).load.vae().state_dict()
    original = open_sd(tiny_sd_folder).load.vae().state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert not torch.equal(actual["decoder.conv_in.weight"], original["decoder.conv_in.weight"])


class Allocations(TorchDispatchMode):
    """A dispatch mode that counts the bytes allocated and the random numbers drawn on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self.num_draws = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if isinstance(out, Tensor) and out.device.type == "cpu":
            self.num_draws += name in ("normal_", "uniform_", "randn", "rand")
            if name in ("empty", "empty_strided", "zeros", "ones", "clone", "_to_copy", "new_empty"):
                self.num_bytes += out.numel() * out.element_size()
        return out


@pytest.mark.parametrize(("mixed_precision", "bytes_made"), [("no", 4), ("bf16", 4 + 2)])
def test_loading_allocates_each_weight_once_and_initialises_none(open_sd, tiny_sd_file, mixed_precision, bytes_made):
    """Float32 weights are read into place, or read and cast; convolution kernels change their layout in the cast."""
    load = open_sd(tiny_sd_file, mixed_precision).load
    for get in (load.denoiser, load.vae, lambda: load.text_encoders()[0]):
        with Allocations() as allocations:
            model = get()
        weights = list(model.parameters())
        expected = bytes_made * sum(p.numel() for p in weights)
        if mixed_precision == "no":
            expected += 4 * sum(p.numel() for p in weights if p.ndim == 4)
        assert allocations.num_draws == 0
        assert expected <= allocations.num_bytes <= expected + 2048  # position ids and the like


def test_a_model_loads_without_reading_the_others(open_sd, tiny_sd_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd_folder, folder)
    load = open_sd(folder).load
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"")
    assert load.denoiser() is not None


def test_the_file_may_be_replaced_after_loading(open_sd, tmp_path):
    """Weights are copies, so overwriting the checkpoint during the run has no effect."""
    path = build_tiny_sd(tmp_path, 13, "safetensors")
    unet = open_sd(path).load.denoiser()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 4096)
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())


def test_a_file_that_changes_before_it_is_read_is_refused_by_name(open_sd, tmp_path):
    """Weights may be read hours after the header if latents are cached in between."""
    path = build_tiny_sd(tmp_path, 13, "safetensors")
    load = open_sd(path).load
    build_tiny_sd(tmp_path, 14, "safetensors")
    with pytest.raises(ValueError, match=r"tiny_sd.safetensors was changed while it was being read"):
        load.denoiser()


def test_position_ids_are_right_although_no_file_has_them(open_sd, tiny_sd_folder):
    (encoder,) = open_sd(tiny_sd_folder).load.text_encoders()
    assert torch.equal(encoder.embeddings.position_ids, torch.arange(77)[None])


def test_the_unet_gives_the_same_output_in_channels_last(open_sd, tiny_sd_folder):
    arch = open_sd(tiny_sd_folder)
    unet = arch.load.denoiser()
    latents_BCHW = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(32))
    noised = Noised(latents_BCHW, latents_BCHW, latents_BCHW, torch.ones(1), torch.tensor([400]))
    conditioning = {"hidden_state": torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(33))}
    plain = arch.predict(unet, noised, conditioning, None)
    last = arch.predict(unet.to(memory_format=torch.channels_last), noised, conditioning, None)
    torch.testing.assert_close(plain, last, **FLOAT32_DEEP)


def test_a_v_prediction_model_without_the_flag_is_warned_about(open_sd, tiny_sd_folder, tmp_path, caplog):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd_folder, folder)
    (folder / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    with caplog.at_level(logging.WARNING):
        open_sd(folder)
    assert "add --v_parameterization" in caplog.text


def test_metadata_names_the_model_and_its_prediction_type(open_sd, tiny_sd_folder):
    plain, velocity = open_sd(tiny_sd_folder).metadata, open_sd(tiny_sd_folder, v_parameterization=True).metadata
    assert (plain["ss_base_model_version"], velocity["ss_base_model_version"]) == ("sd_v1", "sd_v1_v")
    assert (plain["modelspec.prediction_type"], velocity["modelspec.prediction_type"]) == ("epsilon", "v")


def test_mem_eff_attn_reports_that_sdpa_is_used(tiny_sd_folder, caplog):
    from library.models.unet_loader import should_use_xformers
    from library.options.machine.memory import MemoryOptions

    with caplog.at_level(logging.INFO):
        assert not should_use_xformers(MemoryOptions(mem_eff_attn=True), is_deterministic=True)
    assert "sdpa" in caplog.text


@pytest.mark.parametrize("xformers", [False, True])
def test_all_attention_layers_use_sdpa(open_sd, tiny_sd_folder, monkeypatch, caplog, xformers):
    """Fall back to SDPA if --xformers is given but not installed; front ends set it by default."""
    monkeypatch.setitem(sys.modules, "xformers", None)
    unet = open_sd(tiny_sd_folder, xformers=xformers).load.denoiser()
    assert ("the package xformers, which is not installed" in caplog.text) == xformers
    assert {type(p).__name__ for p in unet.attn_processors.values()} == {"AttnProcessor2_0"}


def test_the_tiny_model_is_small(tiny_sd_folder: Path, tiny_sd_file: Path):
    assert sum(f.stat().st_size for f in tiny_sd_folder.rglob("*") if f.is_file()) < 2_000_000
    assert tiny_sd_file.stat().st_size < 2_000_000


# Files that are not SD 1.x checkpoints are refused with what they are and what to do.

OTHER_FILES = {
    "sdxl": (["conditioner.embedders.0.transformer.x", "model.diffusion_model.input_blocks.0.0.weight"],
             "this is an SDXL checkpoint; use sdxl_train_network.py"),
    "sd3": (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "use sd3_train_network.py"),
    "flux": (["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"], "use flux_train_network.py"),
    "hunyuan": (["byt5_in.fc1.weight", "double_blocks.0.img_attn_qkv.weight"], "use hunyuan_image_train_network.py"),
    "lumina": (["cap_embedder.0.weight", "layers.0.attention.qkv.weight"], "use lumina_train_network.py"),
    "anima": (["net.llm_adapter.embed.weight", "net.blocks.0.x"], "use anima_train_network.py"),
    "sd2": (["cond_stage_model.model.ln_final.weight", "model.diffusion_model.out.0.weight"],
            "this is an SD 2.x checkpoint; add --v2"),
    "lora": (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "an adapter (LoRA), not a base model"),
    "vae": (["encoder.down.0.block.0.norm1.weight", "decoder.conv_in.weight"], "this is a VAE, not a base model"),
    "unet": (["down_blocks.0.resnets.0.conv1.weight"], "only the U-Net of a diffusers folder"),
    "text": (["text_model.encoder.layers.0.mlp.fc1.weight"], "only a text encoder"),
    "embedding": (["emb_params"], "a textual inversion embedding"),
    "none": (["thing.weight"], "not a checkpoint of a supported base model (first names: thing.weight)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_the_error_for_another_kind_of_file_says_what_it_is(open_sd, tmp_path, kind):
    names, message = OTHER_FILES[kind]
    save_file({name: torch.randn(2, 2) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        open_sd(tmp_path / "model.safetensors")
    assert "--pretrained_model_name_or_path" in str(error.value) and "model.safetensors" in str(error.value)


def write_changed_copy(tiny_sd_file: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    tensors = {**load_file(tiny_sd_file), **changes}
    shutil.copytree(tiny_sd_file.parent / "tokenizer", folder / "tokenizer")
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "changed.safetensors")
    return folder / "changed.safetensors"


def test_v2_is_refused_for_an_sd1_checkpoint(open_sd, tiny_sd_file, tiny_sd_folder):
    with pytest.raises(ValueError, match=r"this is an SD 1.x checkpoint; remove --v2"):
        open_sd(tiny_sd_file, v2=True)
    with pytest.raises(ValueError, match=r"this is an SD 1.x model; remove --v2"):
        open_sd(tiny_sd_folder, v2=True)


def test_the_error_for_a_checkpoint_without_a_vae_suggests_the_vae_flag(
    open_sd, tiny_sd_file, tiny_sd_folder, tmp_path
):
    dropped = {name: None for name in load_file(tiny_sd_file) if name.startswith("first_stage_model.")}
    path = write_changed_copy(tiny_sd_file, tmp_path, **dropped)
    with pytest.raises(ValueError, match=r"has no VAE .*; use --vae"):
        open_sd(path)
    assert open_sd(path, vae=str(tiny_sd_folder)).load.vae() is not None


def test_a_truncated_safetensors_file_is_refused_by_name(open_sd, tiny_sd_file, tmp_path):
    path = tmp_path / "half.safetensors"
    path.write_bytes(tiny_sd_file.read_bytes()[:500_000])
    with pytest.raises(ValueError, match=r"half.safetensors is not a complete safetensors file: it is truncated"):
        open_sd(path)


def test_a_truncated_ckpt_is_refused_by_name(open_sd, tmp_path):
    path = build_tiny_sd(tmp_path, 14, "ckpt")
    path.write_bytes(path.read_bytes()[:400_000])
    with pytest.raises(ValueError, match=r"--pretrained_model_name_or_path: .*tiny_sd.ckpt"):
        open_sd(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a shopping list: apples, pears and plums\n", "is a text file, not a checkpoint; it begins with 'a shopping"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"", "is empty"),
        (b"PK\x03\x04" + bytes(range(200)), "cannot be read as a file of plain tensors"),
    ],
)
def test_leftovers_of_failed_downloads_are_recognised(open_sd, tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_sd(tmp_path / "model.safetensors")


class MaliciousPickle:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_pickle_with_code_is_refused_and_not_executed(open_sd, tmp_path):
    torch.save({"state_dict": {}, "callback": MaliciousPickle(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"could run code; convert it to .safetensors"):
        open_sd(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("StableDiffusionXLPipeline", "this is an SDXL model; use sdxl_train_network.py"),
        ("FluxPipeline", "this is a FLUX model; use flux_train_network.py"),
        ("StableDiffusion3Pipeline", "this is an SD3 model; use sd3_train_network.py"),
    ],
)
def test_the_error_for_the_folder_of_another_model_says_what_it_is(open_sd, tiny_sd_folder, tmp_path, index, message):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": index}))
    with pytest.raises(ValueError, match=message):
        open_sd(tmp_path)


def test_the_error_for_a_folder_of_checkpoints_suggests_the_file(open_sd, tmp_path):
    (tmp_path / "anything.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is not a diffusers folder: .* to use anything.safetensors in it, give"):
        open_sd(tmp_path)


def test_the_error_for_a_folder_without_weights_names_the_expected_file(open_sd, tiny_sd_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd_folder, folder)
    (folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"text_encoder has no weights; expected model.safetensors in it"):
        open_sd(folder)


def test_the_error_for_a_mistyped_path_suggests_the_nearest_name(open_sd, tiny_sd_file):
    with pytest.raises(ValueError, match=r"does not exist; did you mean .*tiny_sd.safetensors\?"):
        open_sd(tiny_sd_file.with_name("tinysd.safetensors"))


def test_the_error_for_a_missing_model_names_the_flag(open_sd):
    with pytest.raises(ValueError, match="--pretrained_model_name_or_path is missing"):
        open_sd(None)


def test_a_vae_with_16_channels_is_refused(open_sd, tiny_sd_file, tmp_path):
    prefix = "first_stage_model."
    vae = {k: v for k, v in load_file(tiny_sd_file).items() if k.startswith(prefix)}
    vae[f"{prefix}decoder.conv_in.weight"] = torch.randn(16, 16, 3, 3)
    save_file(vae, tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match=r"--vae .* has 16 latent channels, but SD 1.x needs 4"):
        open_sd(tiny_sd_file, vae=str(tmp_path / "ae.safetensors"))


def test_a_file_without_a_decoder_is_refused_as_vae(open_sd, tiny_sd_file, tmp_path):
    save_file({"thing": torch.randn(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"--vae .* is not a VAE for SD 1\.x: .*first names: thing"):
        open_sd(tiny_sd_file, vae=str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("clip_skip", [0, 3])
def test_clip_skip_beyond_the_layers_is_refused(open_sd, tiny_sd_file, clip_skip):
    with pytest.raises(ValueError, match=f"--clip_skip is {clip_skip}, but the text encoder has 2 layers; use 1 to 2"):
        open_sd(tiny_sd_file, clip_skip=clip_skip)
