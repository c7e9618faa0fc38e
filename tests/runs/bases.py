"""Tiny models of every trainable base model, for the suites that run all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.tiny.anima import build_tiny_anima
from tests.tiny.chroma import build_tiny_chroma
from tests.tiny.flux import build_tiny_flux
from tests.tiny.flux_2 import build_tiny_flux_2
from tests.tiny.hunyuan_image import build_tiny_hunyuan_image
from tests.tiny.krea2 import build_tiny_krea2
from tests.tiny.lumina import build_tiny_lumina
from tests.tiny.qwen_image_21 import build_tiny_qwen_image_21
from tests.tiny.sd import build_tiny_sd
from tests.tiny.sd3 import build_tiny_sd3
from tests.tiny.sdxl import build_tiny_sdxl
from tests.tiny.zimage import build_tiny_zimage


@dataclass(frozen=True)
class Base:
    """A training script, a tiny model for it, and its network module."""

    script: str
    module: str
    build: Callable[[Path], list[str]]  # writes the model into a folder and returns the options that select it
    adapts_text_encoders: bool = True


def path_argument(path: Path, *more: str) -> list[str]:
    return ["--pretrained_model_name_or_path", str(path), *more]


BASES: Mapping[str, Base] = {
    "sd": Base("train_network", "networks.lora", lambda folder: path_argument(build_tiny_sd(folder, 51))),
    "sd2": Base("train_network", "networks.lora", lambda f: path_argument(build_tiny_sd(f, 52, is_v2=True), "--v2")),
    "sdxl": Base("sdxl_train_network", "networks.lora", lambda folder: path_argument(build_tiny_sdxl(folder, 53))),
    "flux": Base(
        "flux_train_network",
        "networks.lora_flux",
        lambda folder: [*build_tiny_flux(folder, 54), "--t5xxl_max_token_length", "32"],
    ),
    "chroma": Base(
        "flux_train_network",
        "networks.lora_flux",
        lambda folder: [*build_tiny_chroma(folder, 59), "--guidance_scale", "0", "--t5xxl_max_token_length", "32"],
        adapts_text_encoders=False,
    ),
    "sd3": Base(
        "sd3_train_network",
        "networks.lora_sd3",
        lambda folder: path_argument(build_tiny_sd3(folder, 55), "--t5xxl_max_token_length", "16"),
    ),
    "lumina": Base(
        "lumina_train_network",
        "networks.lora_lumina",
        lambda folder: [*build_tiny_lumina(folder, 56), "--gemma2_max_token_length", "32"],
    ),
    "anima": Base(
        "anima_train_network",
        "networks.lora_anima",
        lambda f: [*build_tiny_anima(f, 57), "--qwen3_max_token_length", "32", "--t5_max_token_length", "32"],
    ),
    "hunyuan_image": Base(
        "hunyuan_image_train_network",
        "networks.lora_hunyuan_image",
        lambda folder: build_tiny_hunyuan_image(folder, 58),
        adapts_text_encoders=False,
    ),
    "zimage": Base(
        "zimage_train_network",
        "networks.lora_zimage",
        lambda folder: build_tiny_zimage(folder, 60),
        adapts_text_encoders=False,
    ),
    "flux_2": Base(
        "flux_2_train_network",
        "networks.lora_flux_2",
        lambda folder: build_tiny_flux_2(folder, 61),
        adapts_text_encoders=False,
    ),
    "krea2": Base(
        "krea2_train_network",
        "networks.lora_krea2",
        lambda folder: build_tiny_krea2(folder, 62),
        adapts_text_encoders=False,
    ),
    "qwen_image_21": Base(
        "qwen_image_21_train_network",
        "networks.lora_qwen_image_21",
        lambda folder: build_tiny_qwen_image_21(folder, 62),
        adapts_text_encoders=False,
    ),
}


def base_of(name: str) -> Base:
    """Return the base model called `name`."""
    return BASES[name]
