"""tools/merge_lora.py and tools/extract_lora_from_models.py, run as commands on tiny base models."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from library.architectures.sd.assembly import build as build_sd
from library.architectures.sdxl.assembly import build as build_sdxl
from library.architectures.sdxl.options import SdxlOptions
from library.checkpoints.files import load_state_dict
from library.checkpoints.hashes import sshs_hashes
from library.checkpoints.headers import read_metadata
from library.checkpoints.saving import save_safetensors
from library.commands.base_models import find_adapter_targets, open_base_model
from library.options.model import ModelOptions
from library.options.train import TrainOptions
from networks.core.files.adapter_file import AdapterFile, parse_adapter, read_adapter_file
from networks.lora import create_network
from tests.tolerances import FLOAT32_SAME_MATH
from tools import convert_lora, extract_lora_from_models, merge_lora
from tools.extract_lora_from_models import main as extract_command
from tools.merge_adapters import Arithmetic, Weighted, merge_adapters
from tools.merge_lora import main as merge_command

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
RESNET, ATTENTION = "lora_unet_down_blocks_0_resnets_0", "lora_unet_down_blocks_0_attentions_0"


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return 0.1 * torch.randn(shape, generator=generator)


def write_adapter(path: Path, base: Path, seed: int, rank: int = 2, alpha: float = 3.0) -> Path:
    """A LoRA on every layer that conv_dim adapts."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in (
        site
        for target_modules in find_adapter_targets(open_base_model("--sd_model", base), True)
        for site in target_modules
    ):
        shape = tuple(site.module.weight.shape)  # type: ignore[union-attr]
        tensors[f"{site.name}.lora_down.weight"] = randn(generator, rank, *shape[1:])
        tensors[f"{site.name}.lora_up.weight"] = randn(generator, shape[0], rank, *(1,) * (len(shape) - 2))
        tensors[f"{site.name}.alpha"] = torch.tensor(alpha)
    metadata = {
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-v1/lora",
    }
    save_safetensors(path, tensors, metadata)
    return path


def merge(*arguments: object) -> int:
    return merge_lora.main([str(argument) for argument in arguments])


def extract(*arguments: object) -> int:
    return extract_lora_from_models.main([str(argument) for argument in arguments])


def test_weights_without_an_adapter_are_copied_bit_for_bit_in_their_dtype(tmp_path: Path, tiny_sd_file: Path) -> None:
    old = {key: value.half() for key, value in load_state_dict(tiny_sd_file).items()}
    old["model_ema.num_updates"] = torch.tensor(7)
    save_safetensors(tmp_path / "base.safetensors", old, {"modelspec.hash_sha256": "0xabc", "note": "kept"})
    adapter = write_adapter(tmp_path / "a.safetensors", tmp_path / "base.safetensors", 72)
    adapter_tensors = {k: v for k, v in load_state_dict(adapter).items() if k.startswith(f"{ATTENTION}_proj_in.")}
    save_safetensors(adapter, adapter_tensors)
    out = tmp_path / "merged.safetensors"
    assert merge("--sd_model", tmp_path / "base.safetensors", "--models", adapter, "--save_to", out) == 0
    new = load_state_dict(out)
    assert new.keys() == old.keys()
    assert all(new[key].dtype == old[key].dtype for key in old)
    changed = [key for key in old if not torch.equal(new[key], old[key])]
    assert changed == ["model.diffusion_model.input_blocks.1.1.proj_in.weight"]
    metadata = read_metadata(out)
    assert metadata["modelspec.merged_from"] == "base, a"
    assert metadata["note"] == "kept" and "modelspec.hash_sha256" not in metadata


def test_save_precision_casts_every_tensor_of_a_checkpoint_but_whole_numbers(
    tmp_path: Path, tiny_sd_file: Path
) -> None:
    adapter, base = write_adapter(tmp_path / "a.safetensors", tiny_sd_file, 73), tmp_path / "base.safetensors"
    positions = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_safetensors(base, {**load_state_dict(tiny_sd_file), **positions})
    out = tmp_path / "m.ckpt"
    arguments = ("--sd_model", base, "--models", adapter, "--save_to", out, "--save_precision", "bf16")
    assert merge(*arguments) == 0
    before = load_state_dict(base)
    dtypes = {(before[key].is_floating_point(), tensor.dtype) for key, tensor in load_state_dict(out).items()}
    assert dtypes == {(True, torch.bfloat16), (False, torch.int64)}


def test_namings_of_other_trainers_and_all_kinds_are_merged(tmp_path: Path, tiny_sd_file: Path) -> None:
    generator = torch.Generator().manual_seed(74)
    base = load_state_dict(tiny_sd_file)
    stem = "model.diffusion_model.input_blocks.1."
    to_k, conv = base[f"{stem}1.transformer_blocks.0.attn2.to_k.weight"], base[f"{stem}0.in_layers.2.weight"]
    tensors = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": randn(generator, 3, 32),
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight": randn(generator, 16, 3),
        f"diffusion_{stem[len('model.diffusion_') :]}0.in_layers.2.lora_down.weight": randn(generator, 2, 16, 1, 1),
        f"diffusion_{stem[len('model.diffusion_') :]}0.in_layers.2.lora_mid.weight": randn(generator, 2, 2, 3, 3),
        f"diffusion_{stem[len('model.diffusion_') :]}0.in_layers.2.lora_up.weight": randn(generator, 16, 2, 1, 1),
        f"{RESNET}_norm1.w_norm": randn(generator, 16),
        f"{RESNET}_norm1.b_norm": randn(generator, 16),
        f"{ATTENTION}_transformer_blocks_0_attn2_to_q.lora_down.weight": randn(generator, 2, 16),
        f"{ATTENTION}_transformer_blocks_0_attn2_to_q.lora_up.weight": randn(generator, 16, 2),
        f"{ATTENTION}_transformer_blocks_0_attn2_to_q.dora_scale": 1 + randn(generator, 1, 16),
    }
    save_safetensors(tmp_path / "a.safetensors", tensors)
    out = tmp_path / "m.safetensors"
    assert merge("--sd_model", tiny_sd_file, "--models", tmp_path / "a.safetensors", "--save_to", out) == 0
    new = load_state_dict(out)
    modules = read_adapter_file(tmp_path / "a.safetensors").modules.values()
    (linear,) = (m for m in modules if m.form == "low_rank" and not m.is_dora)
    (tucker,) = (m for m in modules if m.form == "tucker")
    (dora,) = (m for m in modules if m.is_dora)
    key = f"{stem}1.transformer_blocks.0.attn2.to_k.weight"
    torch.testing.assert_close(new[key], to_k + linear.weight(), **FLOAT32_SAME_MATH)
    torch.testing.assert_close(new[f"{stem}0.in_layers.2.weight"], conv + tucker.weight(), **FLOAT32_SAME_MATH)
    for leaf, name in (("weight", "w_norm"), ("bias", "b_norm")):
        expected = base[f"{stem}0.in_layers.0.{leaf}"] + tensors[f"{RESNET}_norm1.{name}"]
        torch.testing.assert_close(new[f"{stem}0.in_layers.0.{leaf}"], expected, **FLOAT32_SAME_MATH)
    columns = new[f"{stem}1.transformer_blocks.0.attn2.to_q.weight"].norm(dim=0)
    torch.testing.assert_close(columns, dora.tensors["dora_scale"][0], **FLOAT32_SAME_MATH)


def test_modules_that_the_checkpoint_lacks_are_named(
    tmp_path: Path, tiny_sd_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "lora_unet_down_blocks_7_attentions_0_proj_in"
    generator = torch.Generator().manual_seed(75)
    tensors = {f"{name}.lora_down.weight": randn(generator, 2, 8), f"{name}.lora_up.weight": randn(generator, 8, 2)}
    save_safetensors(tmp_path / "a.safetensors", tensors)
    out = tmp_path / "m.safetensors"
    assert merge("--sd_model", tiny_sd_file, "--models", tmp_path / "a.safetensors", "--save_to", out) == 1
    assert name in capsys.readouterr().err
    assert not out.exists()


def test_the_fix_suggested_for_missing_modules_works(
    tmp_path: Path, tiny_sd_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Modules that the base model never has can be dropped by a command; text encoders are in another file."""
    adapter, out = write_adapter(tmp_path / "a.safetensors", tiny_sd_file, 77), tmp_path / "m.safetensors"
    tensors, pair = load_state_dict(adapter), ("lora_down.weight", "lora_up.weight")
    for name, hint in (
        ("lora_te_text_projection", "convert_lora.py --to kohya --drop_unsupported"),
        ("lora_te_text_model_encoder_layers_11_mlp_fc1", "use a checkpoint with all parts"),
    ):
        more = {f"{name}.{leaf}": torch.ones(2, 2) for leaf in pair}
        save_safetensors(tmp_path / "b.safetensors", {**tensors, **more}, read_metadata(adapter))
        assert merge("--sd_model", tiny_sd_file, "--models", tmp_path / "b.safetensors", "--save_to", out) == 1
        error = capsys.readouterr().err
        assert name in error and hint in error
        if "convert_lora" in hint:
            paths = ["--model", str(tmp_path / "b.safetensors"), "--save_to", str(tmp_path / "c.safetensors")]
            assert convert_lora.main([*paths, "--to", "kohya", "--drop_unsupported"]) == 0
            assert merge("--sd_model", tiny_sd_file, "--models", tmp_path / "c.safetensors", "--save_to", out) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratios", "1", "0.5"], "--ratios has 2 values, but --models 1"),
        (["--ratios", "nan"], "--ratios has nan; use a finite number"),
        (["--concat", "--new_rank", "3"], "--new_rank and --concat exclude each other"),
        (["--new_conv_rank", "0"], "--new_conv_rank is 0"),
        (["--sd_model", "no_such.safetensors"], "--sd_model no_such.safetensors does not exist"),
        (["--sd_model", "a.safetensors", "--concat"], "--concat makes one LoRA of several"),
    ],
)
def test_conflicting_options_are_refused(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(76)
    tensors = {
        "lora_unet_x.lora_down.weight": randn(generator, 2, 8),
        "lora_unet_x.lora_up.weight": randn(generator, 8, 2),
    }
    save_safetensors(tmp_path / "a.safetensors", tensors)
    out = tmp_path / "m.safetensors"
    assert merge("--models", tmp_path / "a.safetensors", "--save_to", out, *arguments) == 1
    assert message in capsys.readouterr().err


def test_an_existing_folder_is_not_written_to(
    tmp_path: Path, tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert merge("--sd_model", tiny_sd_folder, "--models", "a.safetensors", "--save_to", tmp_path) == 1
    assert "exists and is a folder of 1 entries, not a model that tools/merge_lora.py wrote" in capsys.readouterr().err


# --- several adapters into one ---


def small_file(seed: int, rank: int, alpha: float, dtype: torch.dtype = torch.float64) -> AdapterFile:
    """A Linear, a 3x3 convolution, and a norm."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"lora_unet_n.w_norm": randn(generator, 5).to(dtype)}
    for name, kernel in (("lora_unet_a", ()), ("lora_unet_c", (3, 3))):
        tensors[f"{name}.lora_down.weight"] = randn(generator, rank, 6, *kernel).to(dtype)
        tensors[f"{name}.lora_up.weight"] = randn(generator, 7, rank, *(1,) * len(kernel)).to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return parse_adapter(tensors, {}, f"file {seed}")


@settings(max_examples=20, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    alpha=st.floats(0.25, 8),
    ratio=st.floats(-2, 2),
    seed=st.integers(0, 2**30),
)
def test_concatenation_is_the_sum_of_the_changes(ranks: list[int], alpha: float, ratio: float, seed: int) -> None:
    adapters = [Weighted(small_file(seed + i, rank, alpha), ratio + i) for i, rank in enumerate(ranks)]
    merged = {module.name: module for module in merge_adapters(adapters, None, Arithmetic(torch.float64, CPU))}
    for name in ("lora_unet_a", "lora_unet_c"):
        total = sum(a.ratio * a.file.modules[name].weight(torch.float64) for a in adapters)
        assert isinstance(total, Tensor)
        assert merged[name].rank == sum(ranks) == merged[name].alpha
        torch.testing.assert_close(merged[name].weight(torch.float64), total, rtol=1e-12, atol=1e-14)
    norm = sum(a.ratio * a.file.modules["lora_unet_n"].tensors["w_norm"].double() for a in adapters)
    assert isinstance(norm, Tensor)
    torch.testing.assert_close(merged["lora_unet_n"].tensors["w_norm"].double(), norm, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ratios", "is_warned"), [((1.41, -1.41), True), ((1, -1), False), ((1.41, -1), False)])
def test_ratios_that_sd_scripts_normalises_to_one_are_warned_about(
    tmp_path: Path, tiny_sd_file: Path, ratios: tuple[float, float], is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In sd-scripts, two files at 1.41 with alpha kept at twice the rank act at 1; here they act at 1.41 as given."""
    a, b = (write_adapter(tmp_path / f"{seed}.safetensors", tiny_sd_file, seed) for seed in (85, 86))
    out = tmp_path / "m.safetensors"
    assert merge("--models", a, b, "--ratios", *ratios, "--concat", "--save_to", out) == 0
    assert ("1.41 times the change of a file. In sd-scripts" in caplog.text) == is_warned
    name = f"{ATTENTION}_proj_in"
    first, second, merged = (read_adapter_file(path).modules[name].weight(torch.float64) for path in (a, b, out))
    torch.testing.assert_close(merged, ratios[0] * first + ratios[1] * second, **FLOAT32_SAME_MATH)


def test_an_svd_merge_is_the_truncated_decomposition_of_the_sum() -> None:
    adapters = [Weighted(small_file(77, 3, 2.0), 1.0), Weighted(small_file(78, 2, 1.0), -0.5)]
    merged = {module.name: module for module in merge_adapters(adapters, (2, 3), Arithmetic(torch.float64, CPU))}
    for name, rank in (("lora_unet_a", 2), ("lora_unet_c", 3)):
        total = sum(a.ratio * a.file.modules[name].weight(torch.float64) for a in adapters)
        assert isinstance(total, Tensor)
        u, s, v = torch.linalg.svd(total.flatten(1), full_matrices=False)
        expected = (u[:, :rank] * s[:rank] @ v[:rank]).reshape(total.shape)
        assert merged[name].rank == rank
        torch.testing.assert_close(merged[name].weight(torch.float64), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_svd_merge_in_16_bits_is_that_in_float32_rounded(dtype: torch.dtype) -> None:
    adapters = [Weighted(small_file(77, 3, 2.0), 1.0), Weighted(small_file(78, 2, 1.0), -0.5)]
    merged_modules = merge_adapters(adapters, (5, 5), Arithmetic(dtype, CPU))
    for merged in (module for module in merged_modules if module.is_low_rank):
        total = sum(a.ratio * a.file.modules[merged.name].weight() for a in adapters)
        assert {merged.tensors[key].dtype for key in ("lora_down.weight", "lora_up.weight")} == {dtype}
        torch.testing.assert_close(merged.weight(), total, rtol=0.05, atol=0.05)


def test_shuffling_without_concatenation_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    generator = torch.Generator().manual_seed(79)
    tensors = {f"lora_unet_x.lora_{side}.weight": randn(generator, 4, 4) for side in ("down", "up")}
    save_safetensors(tmp_path / "a.safetensors", tensors)
    assert merge("--models", tmp_path / "a.safetensors", "--save_to", tmp_path / "m.safetensors", "--shuffle") == 0
    assert "--shuffle has no effect without --concat" in caplog.text


def test_a_merged_file_has_metadata_and_the_hashes_of_its_tensors(tmp_path: Path, tiny_sd_file: Path) -> None:
    a, b = (write_adapter(tmp_path / f"{n}.safetensors", tiny_sd_file, 79, rank=r) for n, r in (("a", 2), ("b", 3)))
    out = tmp_path / "m.safetensors"
    assert merge("--models", a, b, "--ratios", 1, 0.5, "--concat", "--save_to", out, "--save_precision", "fp16") == 0
    metadata, tensors = read_metadata(out), load_state_dict(out)
    assert (metadata["ss_network_module"], metadata["ss_network_dim"]) == ("networks.lora", "5")
    assert metadata["ss_network_alpha"] == "5.0"
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.merged_from"] == "a, b"
    assert (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]) == sshs_hashes(tensors, metadata)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_files_in_different_namings_are_added_module_by_module(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(80)
    down, up = randn(generator, 2, 8), randn(generator, 6, 2)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    kohya = f"lora_unet_{path.replace('.', '_')}"
    save_safetensors(tmp_path / "a.safetensors", {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up})
    peft = {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}
    save_safetensors(tmp_path / "b.safetensors", peft)
    out = tmp_path / "m.safetensors"
    assert merge("--models", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--save_to", out) == 0
    (module,) = read_adapter_file(out).modules.values()
    assert (module.name, module.rank) == (kohya, 2)
    torch.testing.assert_close(module.weight(), 2 * up @ down, **FLOAT32_SAME_MATH)


def test_a_full_weight_difference_cannot_be_added_to_factors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its change does not depend on the base weight."""
    save_safetensors(tmp_path / "a.safetensors", {f"{ATTENTION}_proj_in.diff": torch.ones(8, 8)})
    words = ("--models", tmp_path / "a.safetensors", "--save_to", tmp_path / "m.safetensors", "--new_rank", "4")
    assert merge(*words) == 1
    assert (
        "is a whole weight, which has no factors to add; set --base_model to the checkpoint" in capsys.readouterr().err
    )


def test_dora_cannot_be_added_to_another_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(81)
    tensors = {
        "lora_unet_x.lora_down.weight": randn(generator, 2, 8),
        "lora_unet_x.lora_up.weight": randn(generator, 6, 2),
        "lora_unet_x.dora_scale": torch.ones(1, 8),
    }
    save_safetensors(tmp_path / "a.safetensors", tensors)
    assert merge("--models", tmp_path / "a.safetensors", "--save_to", tmp_path / "m.safetensors") == 1
    error = capsys.readouterr().err
    assert "lora_unet_x is DoRA" in error and "--sd_model" in error


# --- the difference of two checkpoints ---


def test_merging_then_extracting_gives_back_every_change(
    tmp_path: Path, tiny_sd_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, merged = write_adapter(tmp_path / "a.safetensors", tiny_sd_file, 82), tmp_path / "m.safetensors"
    assert merge("--sd_model", tiny_sd_file, "--models", adapter, "--save_to", merged) == 0
    out = tmp_path / "x.safetensors"
    arguments = ("--dim", 2, "--conv_dim", 2, "--min_diff", 1e-4)
    assert extract("--model_org", tiny_sd_file, "--model_tuned", merged, "--save_to", out, *arguments) == 0
    old, new = read_adapter_file(adapter).modules, read_adapter_file(out).modules
    assert old.keys() == new.keys()
    for name in old:
        missed = (new[name].weight() - old[name].weight()).norm() / old[name].weight().norm()
        assert float(missed) < 1e-5
    metadata = read_metadata(out)
    assert (metadata["ss_network_dim"], metadata["ss_base_model_version"]) == ("2", "sd_v1")
    hashes = sshs_hashes(load_state_dict(out), metadata)
    assert (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]) == hashes


def test_text_encoders_below_min_diff_and_kernels_without_conv_dim_are_excluded(
    tmp_path: Path, tiny_sd_file: Path, tiny_sd_folder: Path
) -> None:
    adapter, merged = write_adapter(tmp_path / "a.safetensors", tiny_sd_file, 83), tmp_path / "m.safetensors"
    assert merge("--sd_model", tiny_sd_file, "--models", adapter, "--save_to", merged) == 0
    out = tmp_path / "x.safetensors"
    arguments = ("--dim", 3, "--min_diff", 10)
    assert extract("--model_org", tiny_sd_folder, "--model_tuned", merged, "--save_to", out, *arguments) == 0
    modules = read_adapter_file(out).modules
    unet_targets = find_adapter_targets(open_base_model("--sd_model", tiny_sd_file), False)[1]
    assert modules.keys() == {site.name for site in unet_targets}
    assert {module.form for module in modules.values()} == {"low_rank"}


def test_extracting_from_two_equal_checkpoints_is_refused(
    tmp_path: Path, tiny_sd_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.safetensors"
    assert extract("--model_org", tiny_sd_file, "--model_tuned", tiny_sd_file, "--save_to", out) == 1
    assert "nothing to extract" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--v2"], "is of Stable Diffusion 1.x; remove --v2"),
        (["--sdxl"], "is of Stable Diffusion 1.x; remove --sdxl"),
        (["--dim", "0"], "--dim is 0"),
        (["--min_diff", "nan"], "--min_diff has nan; use a finite number"),
        (["--clamp_quantile", "2"], "--clamp_quantile is 2"),
        (["--model_tuned", "no_such.ckpt"], "--model_tuned no_such.ckpt does not exist"),
    ],
)
def test_impossible_extractions_are_refused(
    tmp_path: Path, tiny_sd_file: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("--model_org", tiny_sd_file, "--model_tuned", tiny_sd_file, "--save_to", tmp_path / "x.safetensors")
    assert extract(*base, *arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("part", ["model.diffusion_model.middle_block.1", "cond_stage_model"])
def test_extracting_from_a_damaged_checkpoint_names_the_layer(
    tmp_path: Path, tiny_sd_file: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN never exceeds --min_diff, so a text encoder with NaN would count as unchanged."""
    tensors = load_state_dict(tiny_sd_file)
    key = next(key for key in tensors if key.startswith(part) and key.endswith(("to_q.weight", "q_proj.weight")))
    tensors[key][0, 0] = torch.nan
    save_safetensors(tmp_path / "tuned.safetensors", tensors)
    words = ("--model_org", tiny_sd_file, "--model_tuned", tmp_path / "tuned.safetensors")
    assert extract(*words, "--save_to", tmp_path / "x.safetensors") == 1
    error = capsys.readouterr().err
    assert f"--model_tuned {tmp_path / 'tuned.safetensors'}: lora_" in error
    assert f"has 1 of {tensors[key].numel()} values that are not finite" in error
    assert not (tmp_path / "x.safetensors").exists()


def test_an_adapter_passed_as_a_checkpoint_is_recognised(
    tmp_path: Path, tiny_sd_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "a.safetensors", tiny_sd_file, 84)
    assert merge("--sd_model", adapter, "--models", adapter, "--save_to", tmp_path / "m.safetensors") == 1
    assert "--sd_model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script",
    ["merge_lora.py", "sdxl_merge_lora.py", "svd_merge_lora.py", "resize_lora.py", "extract_lora_from_models.py"],
)
def test_the_paths_of_sd_scripts_show_help_with_examples(script: str) -> None:
    command = [sys.executable, f"networks/{script}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples:\n  python3 tools/" in done.stdout


@pytest.mark.parametrize("damage", ["NaN", "another size", "twice"])
def test_a_file_that_cannot_be_merged_is_named_with_its_key_and_nothing_is_written(
    damage: str, tiny_sd_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of two files is damaged."""
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    width = load_state_dict(tiny_sd_folder / "unet" / "diffusion_pytorch_model.safetensors")[
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    ].shape[0]
    good = {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.ones(width, 2)}
    bad = dict(good)
    if damage == "NaN":
        bad[f"{name}.lora_up.weight"] = torch.full((width, 2), torch.nan)
    elif damage == "another size":
        bad[f"{name}.lora_up.weight"] = torch.ones(width + 1, 2)
    else:
        path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        bad |= {f"{path}.lora_A.weight": torch.ones(2, width), f"{path}.lora_B.weight": torch.ones(width, 2)}
    for stem, tensors in (("good", good), ("bad", bad)):
        save_safetensors(tmp_path / f"{stem}.safetensors", tensors)
    words = ["--models", str(tmp_path / "good.safetensors"), str(tmp_path / "bad.safetensors")]
    assert merge_lora.main(["--sd_model", str(tiny_sd_folder), *words, "--save_to", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "bad.safetensors" in error and name in error and "good.safetensors" not in error
    assert not (tmp_path / "out").exists()


# Merging into, and extracting from, checkpoints of Stable Diffusion 2.x and XL: files and folders.

SLOW_FOLDER = pytest.param("tiny_sdxl_folder", marks=pytest.mark.nightly)  # a folder and a file of SD 2.x


def models_of(path: Path, is_sdxl: bool) -> tuple[list[nn.Module], nn.Module, Any]:
    """Return (text encoders, U-Net, both as network modules see them)."""
    model = ModelOptions(pretrained_model_name_or_path=str(path), v2=not is_sdxl)
    arch = build_sdxl(SdxlOptions(model=model)) if is_sdxl else build_sd(TrainOptions(model=model))
    encoders, unet = arch.load.text_encoders(), arch.load.denoiser()
    return encoders, unet, arch.view(encoders, unet)


def random_lora(path: Path, is_sdxl: bool, to: Path, rank: int = 4) -> Path:
    view_of_models = models_of(path, is_sdxl)[2]
    network = create_network(1.0, rank, 2.0, None, *view_of_models, conv_dim=str(rank))
    generator = torch.Generator().manual_seed(91)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    network.save_weights(str(to), None, {})
    return to


def copy_path(path: Path, folder: Path, name: str) -> Path:
    """Return the path for a changed copy: a folder for a folder, or a file next to its tokenizer for a file."""
    if path.is_dir():
        return folder / name
    (folder / name).mkdir()
    (folder / name / "tokenizer").symlink_to(path.parent / "tokenizer")
    return folder / name / "model.safetensors"


@pytest.mark.parametrize("name", ["tiny_sd2_file", "tiny_sdxl_file", SLOW_FOLDER])
def test_a_merged_lora_is_extracted_again(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    base, is_sdxl = request.getfixturevalue(name), "sdxl" in name
    lora = random_lora(base, is_sdxl, tmp_path / "lora.safetensors", rank=2)
    tuned = copy_path(base, tmp_path, "merged")
    assert merge_command(["--sd_model", str(base), "--models", str(lora), "--save_to", str(tuned)]) == 0
    out = tmp_path / "out.safetensors"
    arguments = ["--model_org", str(base), "--model_tuned", str(tuned), "--save_to", str(out)]
    assert extract_command([*arguments, "--dim", "4", "--conv_dim", "4", "--sdxl" if is_sdxl else "--v2"]) == 0
    original, extracted = load_file(lora), load_file(out)
    assert original.keys() == extracted.keys()
    for key in (key for key in original if key.endswith("lora_up.weight")):
        stem = key.removesuffix(".lora_up.weight")
        rank = original[f"{stem}.lora_down.weight"].shape[0]
        expected = float(original[f"{stem}.alpha"]) / rank * product(original, stem)
        # the merged weights are rounded to float32: differences of 1e-7 of weights of size 1
        torch.testing.assert_close(product(extracted, stem), expected, rtol=1e-3, atol=1e-5)
    version = read_metadata(out)["ss_base_model_version"]
    assert version == ("sdxl_base_v1-0" if is_sdxl else "sd_v2")


def product(tensors: dict[str, Tensor], stem: str) -> Tensor:
    return tensors[f"{stem}.lora_up.weight"].flatten(1) @ tensors[f"{stem}.lora_down.weight"].flatten(1)


def test_checkpoints_of_two_base_models_have_no_difference(
    tmp_path: Path, tiny_sd2_file: Path, tiny_sdxl_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model_org", str(tiny_sd2_file), "--model_tuned", str(tiny_sdxl_file)]
    assert extract_command([*arguments, "--save_to", str(tmp_path / "x.safetensors")]) == 1
    error = capsys.readouterr().err
    assert "--model_org is an SD 2.x model, --model_tuned an SDXL model" in error


def test_a_lora_for_another_base_model_is_not_merged(
    tmp_path: Path, tiny_sd2_file: Path, tiny_sdxl_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = random_lora(tiny_sdxl_file, True, tmp_path / "lora.safetensors")
    arguments = ["--sd_model", str(tiny_sd2_file), "--models", str(lora)]
    assert merge_command([*arguments, "--save_to", str(tmp_path / "x.safetensors")]) == 1
    assert "was it made for another base model?" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
