"""Full-size checkpoints that take no disk space: a real header, followed by a hole in a sparse file."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from library.architectures.flux_2.model import Flux2
from library.architectures.krea2.model import SingleStreamDiT
from library.architectures.qwen_image_21.model import QwenImage21
from library.architectures.zimage.model import ZImage
from library.models.loading import build_on_meta_device
from tests.contracts.full_size import facts, shapes_of_model
from tests.tiny import flux_2, krea2, qwen_image_21, zimage
from tests.tiny.anima import write_qwen3_tokenizer
from tests.tiny.flux import write_t5_tokenizer
from tests.tiny.hunyuan_image import write_qwen_tokenizer
from tests.tiny.lumina import write_gemma_tokenizer
from tests.tiny.sd import write_tokenizer

Shapes = Mapping[str, tuple[int, ...]]
BF16_BYTES = 2
BYT5_WORDS = {"shared.weight": (1510, 1472)}  # the inventory omits them


def write_header(path: Path, shapes: Shapes) -> str:
    """Write a sparse safetensors file of bfloat16 zeros, with only its header on disk, and return its path."""
    header: dict[str, object] = {}
    start = 0
    for name, shape in shapes.items():
        end = start + BF16_BYTES * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)
    return str(path)


def shapes_of(table: Mapping[str, list[int]], prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(shape) for name, shape in table.items()}


@dataclass(frozen=True)
class FullSize:
    """A full-size base model whose files hold nothing but headers."""

    script: str
    module: str  # its network module
    side: int  # of its usual images, in pixels
    build: Callable[[Path], list[str]]  # writes it into a folder and returns the arguments that select it


def write_files(folder: Path, files: Mapping[str, Shapes]) -> list[str]:
    """Write one file for each flag and return the arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        word
        for flag, shapes in files.items()
        for word in (f"--{flag}", write_header(folder / f"{flag}.safetensors", shapes))
    ]


def build_unet_model(folder: Path, name: str) -> list[str]:
    write_tokenizer(folder / "tokenizer")
    return write_files(folder, {"pretrained_model_name_or_path": shapes_of(facts(name)["checkpoint"])})


def build_flux(folder: Path) -> list[str]:
    parts = facts("flux1")["components"]
    write_tokenizer(folder / "tokenizer")
    write_t5_tokenizer(folder / "tokenizer_2")
    names = {"pretrained_model_name_or_path": "dit", "clip_l": "clip_l", "t5xxl": "t5xxl", "ae": "ae"}
    return write_files(folder, {flag: shapes_of(parts[part]) for flag, part in names.items()})


def build_chroma(folder: Path) -> list[str]:
    parts = {**facts("flux1")["components"], **facts("chroma")["components"]}
    write_t5_tokenizer(folder / "tokenizer_2")
    names = {"pretrained_model_name_or_path": "dit", "t5xxl": "t5xxl", "ae": "ae"}
    return [*write_files(folder, {f: shapes_of(parts[p]) for f, p in names.items()}), "--model_type", "chroma"]


def build_sd3(folder: Path) -> list[str]:
    inventory = facts("sd3")
    write_tokenizer(folder / "tokenizer")
    write_t5_tokenizer(folder / "tokenizer_3")
    denoiser = shapes_of(inventory["mmdit"]["sd3-medium"], "model.diffusion_model.")
    shapes = {"pretrained_model_name_or_path": denoiser | shapes_of(inventory["parts"]["vae"])}
    shapes |= {part: shapes_of(inventory["parts"][part]) for part in ("clip_l", "clip_g", "t5xxl")}
    return write_files(folder, shapes)


def build_lumina(folder: Path) -> list[str]:
    parts = facts("lumina2")["components"]
    write_gemma_tokenizer(folder / "tokenizer")
    ae = facts("flux1")["components"]["ae"]  # the same VAE
    shapes = {"pretrained_model_name_or_path": parts["dit"], "gemma2": parts["gemma2"], "ae": ae}
    return write_files(folder, {flag: shapes_of(table) for flag, table in shapes.items()})


def build_anima(folder: Path, num_blocks: int = 28) -> list[str]:
    """Repeat the last of the inventory's 28 blocks as often as `num_blocks` asks."""
    parts = facts("anima")["components"]
    last = {name: shape for name, shape in parts["dit"].items() if name.startswith("blocks.27.")}
    more = {name.replace("27", str(n), 1): shape for n in range(28, num_blocks) for name, shape in last.items()}
    parts = {**parts, "dit": {**parts["dit"], **more}}
    write_t5_tokenizer(folder / "t5_tokenizer")
    write_qwen3_tokenizer(folder / "tokenizer")
    shapes = {"pretrained_model_name_or_path": parts["dit"], "qwen3": parts["qwen3_0.6b"], "vae": parts["vae"]}
    return write_files(folder, {flag: shapes_of(table) for flag, table in shapes.items()})


def build_hunyuan_image(folder: Path) -> list[str]:
    parts = facts("hunyuan_image")["components"]
    write_qwen_tokenizer(folder / "tokenizer")
    names = {"pretrained_model_name_or_path": "dit", "vae": "vae", "text_encoder": "qwen2_5_vl", "byt5": "byt5"}
    shapes = {flag: shapes_of(parts[part]) for flag, part in names.items()}
    return write_files(folder, {**shapes, "byt5": {**shapes["byt5"], **BYT5_WORDS}})


def build_zimage(folder: Path) -> list[str]:
    models = {
        "pretrained_model_name_or_path": build_on_meta_device(ZImage, zimage.FULL_SIZE),
        "text_encoder": zimage.full_size_qwen3(),
    }
    zimage.write_qwen3_tokenizer(folder / "tokenizer")
    shapes = {flag: shapes_of_model(model) for flag, model in models.items()}
    ae = facts("flux1")["components"]["ae"]  # the same VAE
    return write_files(folder, {**shapes, "vae": shapes_of(ae)})


def build_flux_2(folder: Path, release: str) -> list[str]:
    config = {"dev": flux_2.DEV, "klein-4b": flux_2.KLEIN_4B, "klein-9b": flux_2.KLEIN_9B}[release]
    models = {
        "pretrained_model_name_or_path": build_on_meta_device(Flux2, config),
        "text_encoder": flux_2.full_size_encoder(release),
        "vae": flux_2.full_size_vae(),
    }
    if release == "dev":
        flux_2.write_mistral_tokenizer(folder / "tokenizer")
    else:
        zimage.write_qwen3_tokenizer(folder / "tokenizer", flux_2.QWEN3_SPECIAL)
    return write_files(folder, {flag: shapes_of_model(model) for flag, model in models.items()})


def build_krea2(folder: Path) -> list[str]:
    zimage.write_qwen3_tokenizer(folder / "tokenizer")
    models = {
        "pretrained_model_name_or_path": build_on_meta_device(SingleStreamDiT, krea2.FULL_SIZE),
        "text_encoder": krea2.full_size_qwen3_vl(),
        "vae": krea2.full_size_vae(),
    }
    return write_files(folder, {flag: shapes_of_model(model) for flag, model in models.items()})


def flux_2_of(release: str) -> FullSize:
    return FullSize("flux_2_train_network", "networks.lora_flux_2", 1024, lambda folder: build_flux_2(folder, release))


def build_qwen_image_21(folder: Path) -> list[str]:
    zimage.write_qwen3_tokenizer(folder / "tokenizer", qwen_image_21.MARKS)
    models = {
        "pretrained_model_name_or_path": build_on_meta_device(QwenImage21, qwen_image_21.FULL_SIZE),
        "text_encoder": qwen_image_21.full_size_encoder(),
        "vae": qwen_image_21.full_size_vae(),
    }
    return write_files(folder, {flag: shapes_of_model(model) for flag, model in models.items()})


FULL_SIZE: Mapping[str, FullSize] = {
    "SD 1.5": FullSize("train_network", "networks.lora", 512, lambda folder: build_unet_model(folder, "sd15")),
    "SDXL": FullSize("sdxl_train_network", "networks.lora", 1024, lambda folder: build_unet_model(folder, "sdxl")),
    "SD3 medium": FullSize("sd3_train_network", "networks.lora_sd3", 1024, build_sd3),
    "FLUX.1": FullSize("flux_train_network", "networks.lora_flux", 1024, build_flux),
    "Chroma": FullSize("flux_train_network", "networks.lora_flux", 1024, build_chroma),
    "Lumina Image 2.0": FullSize("lumina_train_network", "networks.lora_lumina", 1024, build_lumina),
    "Anima": FullSize("anima_train_network", "networks.lora_anima", 1024, build_anima),
    "Anima, 40 blocks": FullSize(
        "anima_train_network", "networks.lora_anima", 1024, lambda folder: build_anima(folder, 40)
    ),
    "HunyuanImage 2.1": FullSize(
        "hunyuan_image_train_network", "networks.lora_hunyuan_image", 2048, build_hunyuan_image
    ),
    "FLUX.2 klein 4B": flux_2_of("klein-4b"),
    "FLUX.2 klein 9B": flux_2_of("klein-9b"),
    "FLUX.2 dev": flux_2_of("dev"),
    "Krea 2": FullSize("krea2_train_network", "networks.lora_krea2", 1024, build_krea2),
    "Qwen-Image 2.1": FullSize("qwen_image_21_train_network", "networks.lora_qwen_image_21", 1024, build_qwen_image_21),
    "Z-Image": FullSize("zimage_train_network", "networks.lora_zimage", 1024, build_zimage),
}
