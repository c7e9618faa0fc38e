"""Our claims about diffusers against its loader, with full-size transformer files, key by key.

Each tensor is filled with a unique number to trace it through diffusers' renaming.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.architectures.anima import adapter_names as anima
from library.architectures.flux import adapter_names as flux
from library.architectures.flux_2 import adapter_names as flux_2
from library.architectures.flux_2.model import Flux2
from library.architectures.flux_2.reference import diffusers_config
from library.architectures.krea2 import adapter_names as krea2
from library.architectures.krea2.model import SingleStreamDiT
from library.architectures.lumina import adapter_names as lumina
from library.architectures.qwen_image_21 import adapter_names as qwen_image_21
from library.architectures.qwen_image_21.model import QwenImage21
from library.architectures.sd3 import adapter_names as sd3
from library.architectures.specs import list_specs
from library.architectures.zimage import adapter_names as zimage
from library.architectures.zimage.model import ZImage
from library.checkpoints.adapter_names import NAMINGS, FileNaming
from library.checkpoints.compatibility import Reading, readings
from library.models.loading import build_on_meta_device
from networks.core.files.adapter_file import AdapterFile, adapter_tensors, sort_tensors
from networks.core.files.renaming import rename
from tests.contracts.full_size import facts
from tests.contracts.saved_tensors import listed_shapes
from tests.tiny import krea2 as tiny_krea2
from tests.tiny import qwen_image_21 as tiny_qwen_image_21
from tests.tiny.flux_2 import DEV
from tests.tiny.sd3 import full_size_keys
from tests.tiny.zimage import FULL_SIZE

Shapes = dict[str, list[int]]


def lora_facts(base: str) -> Mapping[str, Any]:
    """Return the keys and shapes of a base model's adapter files, and their changes by network arguments."""
    if base == "sd3":
        lora_keys: Mapping[str, Any] = full_size_keys()["lora"]["sd3-medium"]
        return lora_keys
    if base == "lumina":
        lora: Mapping[str, Any] = facts("lumina2")["lora"]
        return lora
    if base == "zimage":
        return lora_of(build_on_meta_device(ZImage, FULL_SIZE), zimage.KEYS.linear_paths(zimage.NUM_BLOCKS))
    if base == "flux_2":
        return lora_of(build_on_meta_device(Flux2, DEV), flux_2.KEYS.linear_paths(flux_2.NUM_BLOCKS))
    if base == "krea2":
        return lora_of(
            build_on_meta_device(SingleStreamDiT, tiny_krea2.FULL_SIZE), krea2.KEYS.linear_paths(krea2.NUM_BLOCKS)
        )
    if base == "qwen_image_21":
        model = build_on_meta_device(QwenImage21, tiny_qwen_image_21.FULL_SIZE)
        return lora_of(model, qwen_image_21.linear_paths(qwen_image_21.NUM_BLOCKS))
    return facts(
        {
            "flux": "lora_keys_flux1",
            "chroma": "lora_keys_chroma",
            "anima": "lora_keys_anima",
            "hunyuan_image": "lora_keys_hunyuan_image",
        }[base]
    )


def flux_models() -> dict[str, nn.Module]:
    from diffusers import FluxTransformer2DModel

    return {"transformer": FluxTransformer2DModel(guidance_embeds=True)}


def chroma_models() -> dict[str, nn.Module]:
    from diffusers import ChromaTransformer2DModel

    return {"transformer": ChromaTransformer2DModel()}


def sd3_models() -> dict[str, nn.Module]:
    from diffusers import SD3Transformer2DModel

    sizes = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
    return {"transformer": SD3Transformer2DModel(sample_size=128, pos_embed_max_size=192, **sizes)}


def lumina_models() -> dict[str, nn.Module]:
    from diffusers import Lumina2Transformer2DModel

    return {"transformer": Lumina2Transformer2DModel(cap_feat_dim=2304)}


def anima_models() -> dict[str, nn.Module]:
    from diffusers import AnimaTextConditioner, CosmosTransformer3DModel

    from library.architectures.anima.model import read_config
    from library.architectures.anima.reference import conditioner_config, transformer_config

    shapes = {name: tuple(shape) for name, shape in facts("anima")["components"]["dit"].items()}
    config = read_config(shapes)
    return {
        "transformer": CosmosTransformer3DModel(**transformer_config(config)),
        "text_conditioner": AnimaTextConditioner(**conditioner_config(config.adapter)),
    }


def zimage_models() -> dict[str, nn.Module]:
    from diffusers import ZImageTransformer2DModel

    return {"transformer": ZImageTransformer2DModel()}


def flux_2_models() -> dict[str, nn.Module]:
    from diffusers import Flux2Transformer2DModel

    return {"transformer": Flux2Transformer2DModel(**diffusers_config(DEV))}


def krea2_models() -> dict[str, nn.Module]:
    from diffusers import Krea2Transformer2DModel

    return {"transformer": Krea2Transformer2DModel()}


def qwen_image_21_models() -> dict[str, nn.Module]:
    from diffusers import QwenImage21Transformer2DModel

    return {"transformer": QwenImage21Transformer2DModel()}


def lora_of(model: nn.Module, paths: Iterable[str]) -> dict[str, Any]:
    """Return a LoRA of rank 1 on these layers of a full-size model under Kohya names."""
    shapes: Shapes = {}
    for path in paths:
        rows, columns = model.get_submodule(path).weight.shape
        stem = f"lora_unet_{path.replace('.', '_')}"
        shapes |= {f"{stem}.lora_down.weight": [1, columns], f"{stem}.lora_up.weight": [rows, 1], f"{stem}.alpha": []}
    return {"default": shapes}


BASES: dict[str, tuple[Any, Callable[[], dict[str, nn.Module]], str]] = {
    "flux": (flux.NAMES, flux_models, "FluxLoraLoaderMixin"),
    "chroma": (flux.CHROMA_NAMES, chroma_models, "FluxLoraLoaderMixin"),
    "sd3": (sd3.NAMES, sd3_models, "SD3LoraLoaderMixin"),
    "lumina": (lumina.NAMES, lumina_models, "Lumina2LoraLoaderMixin"),
    "anima": (anima.NAMES, anima_models, "AnimaLoraLoaderMixin"),
    "zimage": (zimage.NAMES, zimage_models, "ZImageLoraLoaderMixin"),
    "flux_2": (flux_2.NAMES, flux_2_models, "Flux2LoraLoaderMixin"),
    "krea2": (krea2.NAMES, krea2_models, "Krea2LoraLoaderMixin"),
    "qwen_image_21": (qwen_image_21.NAMES, qwen_image_21_models, "QwenImageLoraLoaderMixin"),
}


@cache
def weights_of(base: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every layer that diffusers can adapt, by model prefix and path."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    with torch.device("meta"):
        models = BASES[base][1]()
        widths = {"flux": (768,), "sd3": (768, 1280)}.get(base, ())
        for number, width in enumerate(widths):
            sizes = {
                "hidden_size": width,
                "intermediate_size": 4 * width,
                "num_hidden_layers": 12 if width == 768 else 32,
            }
            clip = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, num_attention_heads=width // 64))
            models["text_encoder" if number == 0 else f"text_encoder_{number + 1}"] = clip
    return {
        f"{part}.{path.removeprefix('text_model.')}": tuple(module.weight.shape)
        for part, model in models.items()
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def used_by_diffusers(base: str, tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the keys of a file that reach a layer of diffusers' models; none if it rejects the file."""
    import diffusers.loaders.lora_pipeline as loaders

    numbered = {key: n for n, key in enumerate(tensors, 1)}
    filled = {
        key: tensor if key.endswith(".alpha") else torch.full(tensor.shape, float(numbered[key]))
        for key, tensor in tensors.items()
    }
    try:
        converted = getattr(loaders, BASES[base][2]).lora_state_dict(filled)
    except (ValueError, KeyError):
        return set()
    if not all("lora" in key for key in converted):  # load_lora_weights rejects these
        return set()
    layers, used_keys = weights_of(base), set()
    for key, tensor in named_by_peft(base, converted).items():
        path, _, leaf = key.partition(".lora_")
        weight = layers.get(path)
        if weight is not None:
            axis = 1 if leaf == "A.weight" else 0
            assert tensor.shape[axis] == weight[axis], f"{key} does not fit"
            used_keys.add(int(tensor.flatten()[0]))
    used = {key for key, number in numbered.items() if number in used_keys}
    downs = {key: key.replace(".alpha", ".lora_down.weight") for key in tensors if key.endswith(".alpha")}
    return used | {alpha for alpha, down in downs.items() if down in used}


def named_by_peft(base: str, converted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict as diffusers passes it to PEFT, without the level text_model, which some classes lack."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft

    peft_state = {key: tensor for key, tensor in converted.items() if not key.startswith("text_encoder")}
    # T5 is not adapted.
    for part in {"flux": ["text_encoder"], "sd3": ["text_encoder", "text_encoder_2"]}.get(base, []):
        part_state = {key.removeprefix(f"{part}."): t for key, t in converted.items() if key.startswith(f"{part}.")}
        if part_state:
            part_state = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part_state))
        peft_state |= {f"{part}.{key.removeprefix('text_model.')}": tensor for key, tensor in part_state.items()}
    return peft_state


def of_rank_one(key: str, shape: list[int]) -> list[int]:
    """Return the shape of a factor reduced to rank 1, which suffices here."""
    if key.endswith(".lora_down.weight"):
        return [1, *shape[1:]]
    return [shape[0], 1, *shape[2:]] if key.endswith(".lora_up.weight") else shape


def file_of(base: str, variant: str, naming: FileNaming) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of an adapter file whose alphas equal the ranks, so that values stay unchanged."""
    listing = lora_facts(base)
    shapes: Shapes = listing["default"] if variant == "default" else listed_shapes(listing, variant)
    tensors = {key: torch.ones(()).expand(of_rank_one(key, shape)) for key, shape in shapes.items()}
    version = {"flux": "flux1", "sd3": "medium", "lumina": "lumina2", "hunyuan_image": "hunyuan-image-2.1"}.get(
        base, base
    )
    file = AdapterFile("x", sort_tensors(tensors, {}, "").modules, {"ss_base_model_version": version}, {})
    names = next(spec.names for spec in list_specs() if spec.name == base)
    return adapter_tensors(rename(file, names, naming).file), dict(file.metadata)


TEXT_ONLY = "network_train_text_encoder_only"
EVERYTHING = "include_patterns everything + train_llm_adapter"
VARIANTS = {
    "flux": ("default", "in_dims=[5,6,7,8,9]", "train_t5xxl=True", "train_blocks=single", TEXT_ONLY),
    "chroma": ("default", "in_dims=[5,6,7,8,9]", "train_t5xxl=True", "train_blocks=double"),
    "sd3": ("default", "emb_dims=[5,6,7,8,9,10]", "train_t5xxl=True", TEXT_ONLY),
    "lumina": ("default", "embedder_dims=[5,6,7]", "attn_dim=0", "network_train_unet_only", TEXT_ONLY),
    "anima": ("default", "train_llm_adapter=true", EVERYTHING, "network_train_unet_only", TEXT_ONLY),
    "zimage": ("default",),
    "flux_2": ("default",),
    "krea2": ("default",),
    "qwen_image_21": ("default",),
}
CASES = [(base, variant, naming) for base, variants in VARIANTS.items() for variant in variants for naming in NAMINGS]


def claim_about(program: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Reading:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    (claim,) = (reading for reading in readings(list_specs(), shapes, metadata) if reading.program == program)
    return claim


@pytest.mark.parametrize(("base", "variant", "naming"), CASES)
def test_the_keys_we_claim_diffusers_uses_are_those_that_reach_a_layer(
    base: str, variant: str, naming: FileNaming
) -> None:
    tensors, metadata = file_of(base, variant, naming)
    claim = claim_about("diffusers", tensors, metadata)
    assert tensors.keys() - set(claim.unused) == used_by_diffusers(base, tensors)


@pytest.mark.parametrize("naming", NAMINGS)
def test_an_adapted_approximator_loads_under_diffusers_names(naming: FileNaming) -> None:
    shapes = {name: shape for name, shape in facts("chroma")["components"]["dit"].items() if name.endswith("weight")}
    tensors: dict[str, Tensor] = {"lora_unet_double_blocks_0_img_mlp_0.alpha": torch.ones(())}
    for module in flux.CHROMA_NAMES.modules:
        rows, columns = shapes.get(f"{module.generic.removeprefix('diffusion_model.')}.weight", (0, 0))
        if module.kohya.startswith(("lora_unet_distilled", "lora_unet_double")):
            tensors[f"{module.kohya}.lora_down.weight"] = torch.ones(()).expand(1, columns)
            tensors[f"{module.kohya}.lora_up.weight"] = torch.ones(()).expand(rows, 1)
    file = AdapterFile("x", sort_tensors(tensors, {}, "").modules, {}, {})
    tensors = adapter_tensors(rename(file, flux.CHROMA_NAMES, naming).file)
    used = used_by_diffusers("chroma", tensors)
    assert tensors.keys() - set(claim_about("diffusers", tensors, {}).unused) == used
    assert any("distilled" in key for key in used) == (naming == "diffusers")


@pytest.mark.parametrize(
    ("left_out", "num_used"),
    [("final_layer", 356), ("layers_25_|final_layer", 344), ("layers_3_|final_layer", 0), ("mod|final_layer", 0)],
)
def test_diffusers_reads_only_complete_leading_blocks_of_generic_lumina_files(left_out: str, num_used: int) -> None:
    tensors, metadata = file_of("lumina", "network_train_unet_only", "generic")
    remaining = {key: tensor for key, tensor in tensors.items() if not re.search(left_out, key.replace(".", "_"))}
    assert len(remaining) < len(tensors)
    used = used_by_diffusers("lumina", remaining)
    assert len(used) == num_used
    assert remaining.keys() - set(claim_about("diffusers", remaining, metadata).unused) == used
