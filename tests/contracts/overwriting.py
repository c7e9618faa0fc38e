"""Every command with what it writes, how a test calls it, and the inputs for that."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from tests.event_lines import lines_of, whole_run
from tests.running import make_images
from tests.tiny.flux import build_tiny_flux
from tests.tiny.sd import build_tiny_sd
from tests.tiny.sd3 import build_tiny_sd3
from tests.unit.tools import adapter_files
from tests.unit.tools.test_extract_lora import nested_tensors
from tools.quickstart.toy_world import QUICKSTART

Tier = Literal["fast", "slow", "nightly"]


@dataclass(frozen=True)
class Call:
    """A call of a command. `{name}` in `words` and `target` is an input or, for `{out}`, the output folder."""

    words: str
    target: str  # a file or folder that it writes
    tier: Tier = "fast"  # of running it
    reads_first: bool = False  # what it writes depends on its inputs
    foreign: bytes | None = None  # content of the same type that it did not write; None: by the target's extension


SCENE = "a small red heart on a white background"
MERGED = "--models {lora} {lora_2} --save_to {out}/both.safetensors"
CUT = Call("--model {dylora} --save_to {out}/cut.safetensors --rank 2", "{out}/cut-0002.safetensors", reads_first=True)
EXTRACTED = "--dim 2 --save_to {out}/difference.safetensors --model_org"
RESIZED = Call("--model {lora} --save_to {out}/small.safetensors --new_rank 2", "{out}/small.safetensors")
COLLECTED = Call(
    "{images} {out}/all.json --full_path --caption_extension .txt", "{out}/all.json", foreign=b'{"general": {"a": 1}}'
)
CLEANED = Call("{table} {out}/clean.json", "{out}/clean.json")
PREPARED = Call(
    "{images} {table} {out}/prepared.json {sd_folder} --max_resolution 64,64 --full_path "
    "--min_bucket_reso 64 --max_bucket_reso 128",
    "{out}/prepared.json",
    "slow",
)
SMALLER = "{images} {out} --max_resolution 32x32 --copy_associated_files"
PACKED = "--dataset_config {dataset} --out {out}"
TOY_BASE = "--out {out}/base --vae_steps 2 --unet_steps 2 --images_per_scene 1"

CALLS: Mapping[str, tuple[Call, ...]] = {
    "tools/captions_to_metadata.py": (COLLECTED,),
    "tools/clean_metadata.py": (CLEANED,),
    "tools/prepare_metadata.py": (PREPARED,),
    "finetune/merge_captions_to_metadata.py": (COLLECTED,),
    "finetune/merge_dd_tags_to_metadata.py": (COLLECTED,),
    "finetune/clean_captions_and_tags.py": (CLEANED,),
    "finetune/prepare_buckets_latents.py": (PREPARED,),
    "tools/resize_images.py": (
        Call(SMALLER, "{out}/00+32x32.jpg"), Call(SMALLER, "{out}/00+32x32.txt"),
        Call(f"{SMALLER} --save_as_png", "{out}/01+32x32.png"),
    ),
    "tools/resize_images_to_resolution.py": (Call(SMALLER, "{out}/00+32x32.jpg"),),
    "tools/make_shards.py": (
        Call(PACKED, "{out}/images-00000.tar"), Call(PACKED, "{out}/dataset.toml"),
        Call(PACKED, "{out}/.images-shards.json"),
    ),
    "tools/compare_runs.py": (Call("{events} {events_2} --output {out}/both.html", "{out}/both.html"),),
    "tools/report.py": (Call("{events} --output {out}/cat.html", "{out}/cat.html"),),
    "tools/draw.py": (
        Call("{sd_folder} --prompts {prompts} --output {out}", "{out}/01_1.png", "slow"),
        Call("{sd_folder} --prompts {prompts} --output {out} --strengths 0 1", "{out}/strengths.png", "slow"),
    ),
    "tools/contact_sheet.py": (
        Call(
            "--script train_network.py --pretrained_model_name_or_path {sd_folder} --files {sd_lora} "
            "--sample_prompts {prompts} --sheet {out}/sheet.png", "{out}/sheet.png", "slow",
        ),
    ),
    "tools/translate.py": (
        Call("{translated} -o {out}/mine.toml", "{out}/mine.toml"),
        Call("{translated} -o {out}/mine.toml", "{out}/mine-dataset.toml"),
    ),
    "tools/resize_lora.py": (RESIZED,),
    "networks/resize_lora.py": (RESIZED,),
    "tools/convert_lora.py": (
        Call("--model {lora} --save_to {out}/x.safetensors --to generic", "{out}/x.safetensors"),
        Call("--model {lora} --save_to {out}/x.ckpt --to generic", "{out}/x.ckpt"),
    ),
    "networks/convert_flux_lora.py": (
        Call("--src sd-scripts --dst ai-toolkit --src_path {flux_lora} --dst_path {out}/x.safetensors",
             "{out}/x.safetensors", "slow"),
    ),
    "networks/convert_anima_lora_to_comfy.py": (Call("{anima_lora} {out}/x.safetensors", "{out}/x.safetensors"),),
    "networks/convert_hunyuan_image_lora_to_comfy.py": (
        Call("{hunyuan_lora} {out}/x.safetensors", "{out}/x.safetensors"),
    ),
    "tools/extract_lora_from_dylora.py": (CUT,),
    "networks/extract_lora_from_dylora.py": (CUT,),
    "tools/extract_lora_from_models.py": (
        Call(f"{EXTRACTED} {{sd}} --model_tuned {{sd_2}}", "{out}/difference.safetensors", "slow"),
    ),
    "networks/extract_lora_from_models.py": (
        Call(f"{EXTRACTED} {{sd}} --model_tuned {{sd_2}}", "{out}/difference.safetensors", "slow"),
    ),
    "networks/flux_extract_lora.py": (
        Call(f"{EXTRACTED} {{flux}} --model_tuned {{flux_2}}", "{out}/difference.safetensors", "slow"),
    ),
    "tools/merge_lora.py": (
        Call(MERGED, "{out}/both.safetensors"),
        Call("--sd_model {sd} --models {sd_lora} --save_to {out}/x.safetensors", "{out}/x.safetensors", "slow"),
        Call("--sd_model {sd} --models {sd_lora} --save_to {out}/x.ckpt", "{out}/x.ckpt", "slow"),
        Call("--sd_model {sd_folder} --models {sd_lora} --save_to {out}/x", "{out}/x", "slow", reads_first=True),
    ),
    "networks/merge_lora.py": (Call(MERGED, "{out}/both.safetensors"),),
    "networks/sdxl_merge_lora.py": (Call(MERGED, "{out}/both.safetensors"),),
    "networks/svd_merge_lora.py": (Call(MERGED, "{out}/both.safetensors"),),
    "tools/merge_flux_lora.py": (
        Call("--flux_model {flux} --models {flux_lora} --save_to {out}/x.safetensors", "{out}/x.safetensors", "slow"),
    ),
    "networks/flux_merge_lora.py": (Call(MERGED, "{out}/both.safetensors"),),
    "tools/merge_models.py": (
        Call("--models {sd} {sd_2} --output {out}/x.safetensors", "{out}/x.safetensors", "slow"),
    ),
    "tools/merge_sd3_safetensors.py": (
        Call("--dit {sd3} --output {out}/x.safetensors", "{out}/x.safetensors", "slow"),
    ),
    "tools/convert_diffusers_to_flux.py": (
        Call("--diffusers_path {flux_folder} --save_to {out}/x.safetensors", "{out}/x.safetensors", "slow"),
    ),
    "tools/convert_stable_diffusion.py": (
        Call("{sd} {out}/x.safetensors", "{out}/x.safetensors", "slow"),
        Call("{sd} {out}/x --reference_model {sd_folder}", "{out}/x", "slow"),
    ),
    "tools/convert_diffusers20_original_sd.py": (Call("{sd} {out}/x.ckpt", "{out}/x.ckpt", "slow"),),
    "benchmarks/toys/make_dataset.py": tuple(
        Call("--out {out} --prompts {out}/prompts.txt --num_images 2", target)
        for target in ("{out}/heart_01.png", "{out}/heart_01.txt", "{out}/prompts.txt")
    ),
    "benchmarks/toys/make_pairs.py": tuple(
        Call("--out {out} --words red blue --count 2", target)
        for target in ("{out}/red/001.png", "{out}/blue/001.png", "{out}/red/001.txt")
    ),
    "benchmarks/toys/make_toy_base.py": (Call(TOY_BASE, "{out}/base", "nightly"),),
    "benchmarks/toys/make_distilled_toy.py": (
        Call("--kind four_steps --out {out}/base --steps 1", "{out}/base", "nightly"),
    ),
    "benchmarks/toys/make_toy_edit_base.py": (
        Call("--out {out}/base --num_edits 60 --steps 2", "{out}/base", "nightly"),
    ),
    "tools/quickstart/draw_before_after.py": (
        Call("--lora {toy_lora} --prompts {prompts} --out {out}/x.png", "{out}/x.png", "nightly"),
    ),
    "benchmarks/toys/check_edits.py": (
        Call("--references {images} --results {images} --output {out}", "{out}/prompts.txt", "nightly"),
    ),
}  # fmt: skip

ELSEWHERE = "writes only into temporary folders"
NOTHING = "writes no file"
WITHOUT_TARGET: Mapping[str, str] = {
    "train.py": "its files are those of a training script; tests/train_photos/test_train.py",
    "tools/capabilities.py": NOTHING,
    "tools/check_lora_weights.py": NOTHING,
    "tools/choose_checkpoint.py": "adds a line to the report and the events of the run that it judges",
    "tools/doctor.py": NOTHING,
    "tools/front_end.py": "installs into a front end, by its own journal: tests/runs/test_front_end.py",
    "tools/interrogate_lora.py": NOTHING,
    "tools/page.py": "serves until it is stopped; what it writes: tests/page/",
    "tools/plan_memory.py": NOTHING,
    "tools/recipes.py": NOTHING,
    "tools/release.py": "refuses a folder that exists",
    "tools/run_queue.py": "refuses a folder that is no queue: tests/unit/training/test_run_queue.py",
    "tools/show_metadata.py": NOTHING,
    "tools/start.py": "installs packages and starts other commands",
    "tools/verify.py": ELSEWHERE,
    "tools/vote.py": "waits for a browser: tests/unit/tools/test_vote.py",
    "benchmarks/toys/check_adapter.py": NOTHING,
    "networks/check_lora_weights.py": NOTHING,
    "networks/lora_interrogator.py": NOTHING,
    "benchmarks/toys/evidence.py": "keeps the figures that are there, and replaces a table between marks in a page",
    "benchmarks/recipe_heads.py": "replaces the lines that it wrote in the heads of recipes",
    "benchmarks/plan_models.py": "replaces the counts that it wrote, and a table between marks in a page",
    **{
        f"benchmarks/{name}.py": ELSEWHERE
        for name in (
            "adapters", "compiled_blocks", "denoisers", "format_errors", "gpu_step", "own_overhead", "quickstart",
            "run_duration",
        )
    },
}  # fmt: skip


def write_weights(path: Path, *modules: str) -> Path:
    """Write a LoRA of rank 2 for modules of 8 inputs and 6 outputs."""
    generator, tensors = torch.Generator().manual_seed(5), {}
    for name in modules:
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, 8, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(6, 2, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    return path


def write_toy_lora(path: Path) -> Path:
    """Write a LoRA for one layer of the quickstart's base model."""
    (unet,) = (QUICKSTART / "toy_base" / "unet").glob("*.safetensors")
    shapes = {key: tensor.shape for key, tensor in load_file(unet).items()}
    key = next(key for key in shapes if key.endswith("attn1.to_q.weight"))
    name, (height, width) = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}", shapes[key]
    factors = {"lora_down.weight": torch.ones(2, width) / width, "lora_up.weight": torch.ones(height, 2) / height}
    save_file({f"{name}.{leaf}": factor for leaf, factor in factors.items()}, path)
    return path


def write_difference(path: Path, first: str, second: str) -> Path:
    """Write the difference of two inputs as a LoRA that fits them."""
    from tools import extract_lora_from_models

    org, tuned = (INPUTS[name](path.parent / name) for name in (first, second))
    words = ["--model_org", str(org), "--model_tuned", str(tuned), "--save_to", str(path), "--dim", "2"]
    assert extract_lora_from_models.main(words) == 0
    return path


def write_file(path: Path, write: Callable[[Path], object]) -> Path:
    write(path)
    return path


def text(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def write_events(path: Path, name: str) -> Path:
    lines = lines_of(whole_run(20, name))
    return text(path, "".join(f"{json.dumps(line)}\n" for line in lines))


def write_dataset(path: Path) -> Path:
    subset = f'[[datasets.subsets]]\nimage_dir = "{write_images(path.parent / "images").as_posix()}"\n'
    return text(path, f'[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 64\n{subset}')


def write_images(path: Path) -> Path:
    return path if path.exists() else make_images(path, 2)


def write_table(path: Path) -> Path:
    images = write_images(path.parent / "images")
    return text(path, json.dumps({str(images / f"0{n}.png"): {"caption": "a", "tags": "b"} for n in range(2)}))


INPUTS: Mapping[str, Callable[[Path], Path]] = {
    "images": write_images,
    "dataset": lambda path: write_dataset(path.with_suffix(".toml")),
    "table": lambda path: write_table(path.with_suffix(".json")),
    "prompts": lambda path: text(
        path.with_suffix(".txt"), "a small red heart on a white background --w 64 --h 64 --s 2 --d 1\n"
    ),
    "translated": lambda path: text(
        path.with_suffix(".json"), '{"training_method": "LORA", "model_type": "STABLE_DIFFUSION_XL_10_BASE"}'
    ),
    "events": lambda path: write_events(path.with_suffix(".jsonl"), "cat"),
    "events_2": lambda path: write_events(path.with_suffix(".jsonl"), "dog"),
    "lora": lambda path: adapter_files.write(path.with_suffix(".safetensors"), 1),
    "lora_2": lambda path: adapter_files.write(path.with_suffix(".safetensors"), 2),
    "dylora": lambda path: write_file(path.with_suffix(".safetensors"), lambda p: save_file(nested_tensors(3), p)),
    "anima_lora": lambda path: write_weights(path.with_suffix(".safetensors"), "lora_unet_blocks_0_self_attn_q_proj"),
    "hunyuan_lora": lambda path: write_weights(
        path.with_suffix(".safetensors"), "lora_unet_double_blocks_0_img_mlp_fc1"
    ),
    "toy_lora": lambda path: write_toy_lora(path.with_suffix(".safetensors")),
    "sd": lambda path: build_tiny_sd(path, 51, "safetensors"),
    "sd_2": lambda path: build_tiny_sd(path, 52, "safetensors"),
    "sd_folder": lambda path: build_tiny_sd(path, 51),
    "sd_lora": lambda path: write_difference(path.with_suffix(".safetensors"), "sd", "sd_2"),
    "flux": lambda path: Path(build_tiny_flux(path, 53)[1]),
    "flux_2": lambda path: Path(build_tiny_flux(path, 54)[1]),
    "flux_folder": lambda path: Path(build_tiny_flux(path, 53, "diffusers")[1]),
    "flux_lora": lambda path: write_difference(path.with_suffix(".safetensors"), "flux", "flux_2"),
    "sd3": lambda path: build_tiny_sd3(path, 55),
}
