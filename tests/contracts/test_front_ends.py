"""Scripts that graphical front ends start or import by path, with the options they pass."""

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.flux.layers import NAMES
from library.checkpoints.adapter_names import FileNaming
from library.training.command_line.cli import parse
from networks import lora_flux
from networks.core.files.adapter_file import read_adapter_file, save_adapter_file
from networks.core.files.renaming import rename
from tests.contracts.overwriting import write_weights
from tests.running import Finished, make_images, small_run
from tests.runs.musubi_tuner import paths_of, run_command
from tests.tiny.bases import BASES
from tests.tiny.flux import build_tiny_flux, tiny_flux
from tests.tolerances import FLOAT32_DEEP
from tests.unit.networks.toy import randomize
from tests.unit.tools import adapter_files
from tools import check_lora_weights, merge_lora

ROOT = Path(__file__).parents[2]


def load_script(path: str) -> ModuleType:
    """Import a script by its path, as front ends do."""
    spec = importlib.util.spec_from_file_location("loaded_by_path", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def flux(tmp_path: Path) -> dict[str, Path]:
    """Write a tiny FLUX.1 and a random LoRA for its transformer and CLIP-L."""
    arguments = build_tiny_flux(tmp_path / "base", 51)
    files = {flag.removeprefix("--"): Path(path) for flag, path in zip(arguments[::2], arguments[1::2], strict=True)}
    network = lora_flux.create_network(1.0, 4, 2, None, [], tiny_flux(51))
    randomize(network, 7)
    network.save_weights(str(tmp_path / "denoiser.safetensors"), None, {})
    tensors = load_file(tmp_path / "denoiser.safetensors")
    generator, clip = torch.Generator().manual_seed(9), load_file(files["clip_l"])
    outputs, inputs = clip["text_model.encoder.layers.1.mlp.fc1.weight"].shape
    tensors["lora_te1_text_model_encoder_layers_1_mlp_fc1.lora_down.weight"] = torch.randn(
        2, inputs, generator=generator
    )
    tensors["lora_te1_text_model_encoder_layers_1_mlp_fc1.lora_up.weight"] = torch.randn(
        outputs, 2, generator=generator
    )
    tensors["lora_te1_text_model_encoder_layers_1_mlp_fc1.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    return {**files, "lora": tmp_path / "lora.safetensors", "denoiser": tmp_path / "denoiser.safetensors"}


def test_flux_merge_lora_accepts_kohya_ss_arguments(
    tmp_path: Path, flux: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The front end passes no text encoder, so the LoRA's text encoder modules are skipped with a message."""
    command = load_script("networks/flux_merge_lora.py")
    save_to = tmp_path / "merged.safetensors"
    words = ["--flux_model", str(flux["pretrained_model_name_or_path"]), "--save_precision", "float", "--precision",
             "float", "--save_to", str(save_to), "--loading_device", "cpu", "--working_device", "cpu", "--models",
             str(flux["lora"]), "--ratios", "0.5"]  # fmt: skip
    assert command.main(words) == 0
    assert "omitting 1 text encoder layers" in caplog.text
    words = ["--sd_model", str(flux["pretrained_model_name_or_path"]), "--models", str(flux["denoiser"])]
    assert merge_lora.main([*words, "--ratios", "0.5", "--save_to", str(tmp_path / "expected.safetensors")]) == 0
    merged, expected = load_file(save_to), load_file(tmp_path / "expected.safetensors")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], tensor) for key, tensor in expected.items())


def test_flux_merge_lora_merges_into_clip_l(tmp_path: Path, flux: dict[str, Path]) -> None:
    command = load_script("networks/flux_merge_lora.py")
    words = ["--flux_model", str(flux["pretrained_model_name_or_path"]), "--clip_l", str(flux["clip_l"]),
             "--clip_l_save_to", str(tmp_path / "clip.safetensors"), "--mem_eff_load_save", "--models",
             str(flux["lora"]), "--ratios", "2.0", "--save_to", str(tmp_path / "merged.safetensors")]  # fmt: skip
    assert command.main(words) == 0
    before, after, lora = load_file(flux["clip_l"]), load_file(tmp_path / "clip.safetensors"), load_file(flux["lora"])
    name = "lora_te1_text_model_encoder_layers_1_mlp_fc1"
    changed = "text_model.encoder.layers.1.mlp.fc1.weight"
    expected = before[changed] + 2.0 * 0.5 * lora[f"{name}.lora_up.weight"] @ lora[f"{name}.lora_down.weight"]
    torch.testing.assert_close(after[changed], expected, **FLOAT32_DEEP)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before if key != changed)


def test_flux_merge_lora_joins_several_loras(tmp_path: Path, flux: dict[str, Path]) -> None:
    command = load_script("networks/flux_merge_lora.py")
    lora, save_to = str(flux["lora"]), tmp_path / "joined.safetensors"
    words = ["--save_precision", "bf16", "--precision", "float", "--save_to", str(save_to), "--loading_device", "cpu",
             "--working_device", "cpu", "--models", lora, lora, "--ratios", "0.4", "0.6", "--concat", "--shuffle",
             "--no_metadata", "--diffusers"]  # fmt: skip
    assert command.main(words) == 0
    assert read_adapter_file(save_to).modules.keys() == read_adapter_file(flux["lora"]).modules.keys()
    assert {module.rank for module in read_adapter_file(save_to).modules.values()} == {4, 8}  # CLIP-L had rank 2


def test_a_lora_of_another_base_model_is_rejected_by_name(
    tmp_path: Path, flux: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = adapter_files.write(tmp_path / "sd.safetensors", 3)
    words = ["--flux_model", str(flux["pretrained_model_name_or_path"]), "--models", str(other)]
    assert load_script("networks/flux_merge_lora.py").main([*words, "--save_to", str(tmp_path / "no.safetensors")]) == 1
    assert "3 of its 3 modules are in none of the files to merge into" in capsys.readouterr().err
    assert not (tmp_path / "no.safetensors").exists()


def test_flux_extract_lora_accepts_kohya_ss_arguments(tmp_path: Path, flux: dict[str, Path]) -> None:
    base, tuned = str(flux["pretrained_model_name_or_path"]), str(tmp_path / "tuned.safetensors")
    assert merge_lora.main(["--sd_model", base, "--models", str(flux["denoiser"]), "--save_to", tuned]) == 0
    words = ["--model_org", base, "--model_tuned", tuned, "--save_to", str(tmp_path / "found.safetensors"), "--dim",
             "4", "--device", "cpu", "--clamp_quantile", "0.99", "--save_precision", "fp16", "--no_metadata",
             "--mem_eff_safe_open"]  # fmt: skip
    assert load_script("networks/flux_extract_lora.py").main(words) == 0
    modules = read_adapter_file(tmp_path / "found.safetensors").modules
    assert modules.keys() == read_adapter_file(flux["denoiser"]).modules.keys()


@pytest.mark.parametrize(("src", "dst"), [("sd-scripts", "ai-toolkit"), ("ai-toolkit", "sd-scripts")])
def test_convert_flux_lora_converts_in_both_directions(
    tmp_path: Path, flux: dict[str, Path], src: str, dst: str
) -> None:
    namings: dict[str, FileNaming] = {"sd-scripts": "kohya", "ai-toolkit": "diffusers"}
    original = read_adapter_file(flux["denoiser"])
    save_adapter_file(tmp_path / "source.safetensors", rename(original, NAMES, namings[src]).file)
    save_adapter_file(tmp_path / "expected.safetensors", rename(original, NAMES, namings[dst]).file)
    words = ["--src", src, "--dst", dst, "--src_path", str(tmp_path / "source.safetensors")]
    assert (
        load_script("networks/convert_flux_lora.py").main([*words, "--dst_path", str(tmp_path / "out.safetensors")])
        == 0
    )
    converted, expected = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "expected.safetensors")
    assert converted.keys() == expected.keys()


def test_extract_lora_accepts_kohya_ss_arguments(
    tmp_path: Path, tiny_sd_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(tiny_sd_file)
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    ends = [torch.randn(size, 1, generator=torch.Generator().manual_seed(size)) for size in tensors[key].shape]
    save_file({**tensors, key: tensors[key] + 0.1 * ends[0] @ ends[1].T}, tmp_path / "tuned.safetensors")
    save_to = tmp_path / "found.safetensors"
    words = ["--load_precision", "fp16", "--save_precision", "fp16", "--save_to", str(save_to), "--model_org",
             str(tiny_sd_file), "--model_tuned", str(tmp_path / "tuned.safetensors"), "--dim", "2", "--device", "cpu",
             "--clamp_quantile", "1", "--min_diff", "0.01", "--load_original_model_to", "cpu",
             "--load_tuned_model_to", "cpu"]  # fmt: skip
    assert load_script("networks/extract_lora_from_models.py").main(words) == 0
    module = read_adapter_file(save_to).modules["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"]
    actual = module.tensors["lora_up.weight"].float() @ module.tensors["lora_down.weight"].float()
    torch.testing.assert_close(actual, 0.1 * ends[0] @ ends[1].T, atol=1e-3, rtol=1e-2)
    assert "--load_precision has no effect" in caplog.text


def test_older_options_of_the_commands_are_accepted() -> None:
    merge = load_script("networks/merge_lora.py").setup_parser()
    assert merge.parse_args(["--v2", "--save_to", "x.safetensors", "--models", "y.safetensors"]).v2
    assert check_lora_weights.setup_parser().parse_args(["-s", "x.safetensors"]).show_all_keys


def test_an_anima_lora_converts_to_comfyui_names_and_back(tmp_path: Path) -> None:
    """Programs call the converter after training with two paths and nothing else."""
    names = ("lora_unet_blocks_0_self_attn_q_proj", "lora_te_layers_1_mlp_gate_proj")
    source = write_weights(tmp_path / "anima.safetensors", *names)
    command = load_script("networks/convert_anima_lora_to_comfy.py")
    assert command.main([str(source), str(tmp_path / "comfy.safetensors")]) == 0
    text = "text_encoders.qwen3_06b.transformer.model"
    paths = ("diffusion_model.blocks.0.self_attn.q_proj", f"{text}.layers.1.mlp.gate_proj")
    before, after = load_file(source), load_file(tmp_path / "comfy.safetensors")
    assert set(after) == {f"{path}.lora_{factor}.weight" for path in paths for factor in "AB"}
    for name, path in zip(names, paths, strict=True):
        expected = 0.5 * before[f"{name}.lora_up.weight"] @ before[f"{name}.lora_down.weight"]
        actual = after[f"{path}.lora_B.weight"] @ after[f"{path}.lora_A.weight"]
        torch.testing.assert_close(actual, expected, **FLOAT32_DEEP)
    words = ["--reverse", str(tmp_path / "comfy.safetensors"), str(tmp_path / "back.safetensors")]
    assert command.main(words) == 0
    assert load_file(tmp_path / "back.safetensors").keys() == before.keys()


def test_a_hunyuan_image_lora_converts_to_comfyui_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("lora_unet_double_blocks_0_img_mlp_fc1", "lora_unet_single_blocks_3_modulation_linear")
    source = write_weights(tmp_path / "hunyuan.safetensors", *names)
    command = load_script("networks/convert_hunyuan_image_lora_to_comfy.py")
    words = [str(source), str(tmp_path / "comfy.safetensors")]
    assert command.main(words) == 0
    assert {key.partition(".")[0] for key in load_file(tmp_path / "comfy.safetensors")} == {
        "lora_unet_double_blocks_0_img_mlp_0",
        "lora_unet_single_blocks_3_modulation_lin",
    }
    assert command.main(["--reverse", *words]) == 1
    assert "needs no renaming" in capsys.readouterr().err
    anima = write_weights(tmp_path / "anima.safetensors", "lora_unet_blocks_0_self_attn_q_proj")
    assert command.main([str(anima), str(tmp_path / "no.safetensors")]) == 1
    assert "is an adapter of Anima" in capsys.readouterr().err
    assert not (tmp_path / "no.safetensors").exists()


def test_merging_and_resizing_can_be_called_as_coppylora_does(tmp_path: Path) -> None:
    """CoppyLoRA imports the modules by path, passes paths as text and omits options it does not know."""
    first, second = (str(adapter_files.write(tmp_path / f"{n}.safetensors", n)) for n in (1, 2))
    merged, resized = str(tmp_path / "merged.safetensors"), str(tmp_path / "resized.safetensors")
    arguments: dict[str, Any] = {
        "save_precision": "bf16", "precision": "float", "sd_model": None, "save_to": merged, "models": [first, second],
        "no_metadata": False, "ratios": [1.41, -1.41], "concat": True, "shuffle": True,
    }  # fmt: skip
    load_script("networks/sdxl_merge_lora.py").merge(argparse.Namespace(**arguments))
    modules = [read_adapter_file(path).modules[adapter_files.LINEAR] for path in (first, second, merged)]
    assert modules[2].rank == 8
    changes = [module.weight(torch.float64) for module in modules]
    expected = 1.41**2 / 2 * (changes[0] - changes[1])  # the factor that sd-scripts gives a difference
    assert float((changes[2] - expected).norm()) < 2**-8 * float(expected.norm())  # factors stored in bfloat16
    arguments = {
        "save_precision": "bf16", "new_rank": 3, "new_conv_rank": 2, "save_to": resized, "model": merged,
        "device": "cpu", "verbose": "store_true", "dynamic_param": None, "dynamic_method": None,
    }  # fmt: skip
    load_script("networks/resize_lora.py").resize(argparse.Namespace(**arguments))
    assert {module.rank for module in read_adapter_file(resized).modules.values()} == {2, 3}


def cache_files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return modification time and content of the cache files below a folder."""
    paths = [path for path in folder.rglob("*.npz") if not path.name.startswith(".")]
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def coppylora_settings(tmp_path: Path, model: Path) -> dict[str, Any]:
    make_images(tmp_path / "data" / "1_thing", 2)
    return {
        "pretrained_model_name_or_path": str(model), "train_data_dir": str(tmp_path / "data"),
        "output_dir": str(tmp_path), "output_name": "mine", "max_train_steps": 2,
        "sdpa": True, "gradient_checkpointing": True, "seed": 42,
        "persistent_data_loader_workers": True, "max_data_loader_n_workers": 0, "enable_bucket": True,
        "resolution": "64,64", "train_batch_size": 2, "mixed_precision": "no", "save_precision": "fp16",
        "bucket_no_upscale": True, "min_bucket_reso": 64, "max_bucket_reso": 1024, "caption_extension": ".txt",
        "no_half_vae": True, "cache_latents": True, "cache_latents_to_disk": True, "sdxl": True, "skip_existing": True,
        "console_log_simple": True, "lowram": True,
    }  # fmt: skip


def test_training_uses_latents_cached_by_coppylora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_process: None, tiny_sdxl_folder: Path, train: Any
) -> None:
    command = load_script("tools/cache_latents.py")
    monkeypatch.setattr(sys, "argv", ["CoppyLora_webUI.py"])
    parser = command.setup_parser()
    args = command.train_util.read_config_from_file(parser.parse_args(), parser)
    for key, value in coppylora_settings(tmp_path, tiny_sdxl_folder).items():
        setattr(args, key, value)
    command.cache_to_disk(args)
    before = cache_files(tmp_path / "data")
    assert len(before) == 2
    words = ["--pretrained_model_name_or_path", str(tiny_sdxl_folder), "--train_data_dir", str(tmp_path / "data"),
             "--resolution", "64,64", "--enable_bucket", "--bucket_no_upscale", "--cache_latents_to_disk",
             "--no_half_vae", "--output_dir", str(tmp_path / "out"), "--network_module", "networks.lora",
             "--network_dim", "2", "--learning_rate", "1e-3", "--max_train_steps", "1",
             "--max_data_loader_n_workers", "0"]  # fmt: skip
    done = train(words, "sdxl_train_network")
    assert done.status == 0 and "latent cache: 2 entries reused, 0 to encode" in done.stderr
    assert cache_files(tmp_path / "data") == before


def test_text_outputs_cached_separately_are_used_by_training(
    tmp_path: Path, fresh_process: None, tiny_sdxl_folder: Path, train: Any
) -> None:
    """A front end caches in one process and trains in another."""
    make_images(tmp_path / "data" / "1_thing", 2)
    common = ["--pretrained_model_name_or_path", str(tiny_sdxl_folder), "--train_data_dir", str(tmp_path / "data"),
              "--resolution", "64", "--caption_extension", ".txt", "--max_data_loader_n_workers", "0"]  # fmt: skip
    command = load_script("tools/cache_text_encoder_outputs.py")
    assert command.main([*common, "--sdxl", "--skip_cache_check"]) == 0
    before = cache_files(tmp_path / "data")
    assert len(before) == 2
    words = [*common, "--output_dir", str(tmp_path / "out"), "--network_module", "networks.lora", "--network_dim", "2",
             "--learning_rate", "1e-3", "--max_train_steps", "1", "--network_train_unet_only",
             "--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk"]  # fmt: skip
    done = train(words, "sdxl_train_network")
    assert done.status == 0 and "text cache: 3 files reused, 0 to encode" in done.stderr
    assert cache_files(tmp_path / "data") == before


def test_caching_flux_latents_needs_only_the_vae(
    tmp_path: Path, fresh_process: None, flux: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make_images(tmp_path / "data" / "1_thing", 2)
    words = ["--train_data_dir", str(tmp_path / "data"), "--resolution", "64", "--max_data_loader_n_workers", "0"]
    command = load_script("tools/cache_latents.py")
    assert command.main([*words, "--flux", "--ae", str(flux["ae"])]) == 0
    assert sorted(cache_files(tmp_path / "data")) == ["00_0064x0064_flux.npz", "01_0064x0064_flux.npz"]
    with pytest.raises(SystemExit, match="1"):
        command.main([*words, "--flux", "--sdxl"])
    assert "--sdxl and --flux name two base models" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        command.main([*words, "--zimage", "--flux"])
    assert "--flux and --zimage name two base models" in capsys.readouterr().err
    assert load_script("tools/cache_text_encoder_outputs.py").main([*words, "--flux"]) == 1
    assert "--pretrained_model_name_or_path is missing" in capsys.readouterr().err


def test_caching_text_outputs_of_stable_diffusion_1_is_refused(
    tmp_path: Path, fresh_process: None, tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_images(tmp_path / "data" / "1_thing", 1)
    words = ["--train_data_dir", str(tmp_path / "data"), "--resolution", "64"]
    command = load_script("tools/cache_text_encoder_outputs.py")
    assert command.main([*words, "--pretrained_model_name_or_path", str(tiny_sd_folder)]) == 1
    assert "use --sdxl or --flux" in capsys.readouterr().err


# The memory options that musubi-tuner's pages name run on every base model that shares its dialect.
# Paragraphs of docs/flux_2.md, krea2.md, qwen_image_21.md and zimage.md about memory, and of docs/block_swap.md.
# Z-Image
# alone has a tiny model of more blocks than have to stay on the GPU.

FP8 = "--fp8_base --fp8_scaled"
OFFLOADING = "--gradient_checkpointing --gradient_checkpointing_cpu_offload"
SHARED = "--img_in_txt_in_offloading --disable_numpy_memmap --split_attn"
SWAP = "--blocks_to_swap 1 --block_swap_h2d_only --block_swap_ring_size 1 --use_pinned_memory_for_block_swap"
CASES = [
    ("qwen_image_21", "cache_latents", "--vae_tiling"),
    ("qwen_image_21", "cache_text_encoder_outputs", "--fp8_vl"),
    ("qwen_image_21", "cache_text_encoder_outputs", "--device cpu --text_encoder_dtype float32"),
    ("qwen_image_21", "train_network", f"{FP8} --fp8_vl {OFFLOADING} {SHARED}"),
    ("flux_2", "cache_text_encoder_outputs", "--fp8_text_encoder"),
    ("flux_2", "train_network", f"{FP8} --fp8_text_encoder {OFFLOADING} {SHARED}"),
    ("krea2", "train_network", f"{FP8} {OFFLOADING} {SHARED}"),
    ("zimage", "cache_text_encoder_outputs", "--fp8_llm"),
    ("zimage", "train_network", f"{FP8} --fp8_llm {OFFLOADING} {SHARED}"),
    ("zimage", "train_network", f"{FP8} {OFFLOADING} {SWAP}"),
]
# What these save happens here in any case, or is not needed; a line of the log says so.
NO_EFFECT = {
    "img_in_txt_in_offloading",
    "disable_numpy_memmap",
    "split_attn",
    "block_swap_h2d_only",
    "use_pinned_memory_for_block_swap",
}


@pytest.mark.parametrize(
    ("name", "command", "words"), [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])]
)
def test_a_paragraph_about_memory_runs(
    name: str, command: str, words: str, train: Callable[..., Finished], tmp_path: Path
) -> None:
    base = BASES[name]
    assert base.dit is not None
    release = next(iter(base.dit.trained))
    model = base.dit.trained[release](tmp_path / "model")
    version = ["--model_version", release] if release else []
    paths = paths_of(model, tmp_path)
    if command == "train_network":
        run = small_run(tmp_path, tmp_path, base.module, "1")
        run[run.index("--train_data_dir") : run.index("--caption_extension")] = ["--dataset_config", paths["data"]]
        done = train([*model, *run, "--mixed_precision", "bf16", *version, *words.split()], base.script)
        assert done.status == 0 and (tmp_path / "out" / "mine.safetensors").is_file(), done.stderr
        log = done.stderr
    else:
        part = "--vae {vae}" if "latents" in command else "--text_encoder {text}"
        log = run_command(f"{name}_{command}", f"--dataset_config {{data}} {part} {' '.join(version)} {words}", paths)
        assert len(list((tmp_path / "cache").rglob("*.npz"))) >= 3
    flags = {word.removeprefix("--") for word in words.split() if word.startswith("--")}
    assert set(re.findall(r"--(\w+) has no effect", log)) & flags == flags & NO_EFFECT


def test_the_old_name_on_the_page_of_flux_2_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(import_module(BASES["flux_2"].script).setup_parser(), ["--fp8_t5"])
    assert "unrecognized arguments: --fp8_t5 (use --fp8_text_encoder)" in capsys.readouterr().err
