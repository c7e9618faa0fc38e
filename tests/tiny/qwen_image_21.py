"""A tiny but complete Qwen-Image 2.1 model: three files, one file of all, or a diffusers folder."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from library.architectures.qwen_image_21.layers import NAMES, NUM_BLOCKS, linear_paths
from library.architectures.qwen_image_21.model import QwenImage21, QwenImage21Config
from library.architectures.qwen_image_21.reference import diffusers_config, diffusers_model
from library.models.adapter_views import view_denoiser
from library.models.loading import build_on_meta_device
from library.models.qwen3_vl_vision import DEEPSTACK
from library.models.vae.qwen_image import ENDS, MIDDLE, QUANT, RESIDUAL
from tests.tiny.base import Base, Deep, Dit, InDiffusers, Pair, pair_of, training_command
from tests.tiny.headers import write_headers
from tests.tiny.init import fixed_init
from tests.tiny.keys import kohya, lora_of, peft
from tests.tiny.parts import BASE, Parts, tiny_denoiser, write_files, write_folder, write_whole
from tests.tiny.qwen3_vl import MARKS, TEXT, deep_vision, tiny_qwen3_vl
from tests.tiny.zimage import write_qwen3_tokenizer

Layout = Literal["files", "whole", "diffusers"]

CONFIG = QwenImage21Config(in_features=64, width=64, head_width=32, mlp_width=192, text_width=32, num_blocks=2)
FULL_SIZE = QwenImage21Config(
    in_features=64, width=4096, head_width=128, mlp_width=12288, text_width=4096, num_blocks=32
)
VAE = {"base_dim": 4, "decoder_base_dim": 6, "dim_mult": [1, 1, 2, 4, 4], "num_res_blocks": 1}
PREFIX = "text_encoders.qwen3vl_8b.transformer."


def build_tiny_qwen_image_21(folder: Path, seed: int, layout: Layout = "files", flag: str = BASE) -> list[str]:
    """Write a tiny model into `folder` and return the options that select it, with the base model as `flag`. Equal
    seeds give equal weights in every layout."""
    parts = tiny_parts(seed, write_qwen3_tokenizer(folder / "tokenizer", MARKS))
    if layout == "diffusers":
        return write_folder(folder, {"_class_name": "QwenImage21Pipeline"}, parts, flag=flag)
    denoiser, encoder, vae = parts["transformer"][1], parts["text_encoder"][1], parts["vae"][1]
    if layout == "whole":
        text = {PREFIX + key.replace("language_model.", ""): tensor for key, tensor in encoder.items()}
        return write_whole(folder, flag, "qwen_image", with_fused_gates(denoiser), comfy_vae(vae), text)
    files = {"--vae": ("qwen_image_21_vae", vae), "--text_encoder": ("qwen3vl_8b", encoder)}
    return write_files(folder, {flag: ("qwen_image_21_bf16", denoiser), **files})


def tiny_parts(seed: int, num_words: int) -> Parts:
    """Return (config.json, weights) by diffusers' folder name."""
    encoder = tiny_qwen3_vl(seed + 2, num_words, deep_vision(DEEPSTACK[-1] + 1, DEEPSTACK))
    config = json.loads(encoder.config.to_json_string())
    return {
        "transformer": (diffusers_config(CONFIG), tiny_qwen_image_21(seed).state_dict()),
        "vae": tiny_vae(seed + 1),
        "text_encoder": (config, {f"model.{name}": tensor for name, tensor in encoder.state_dict().items()}),
    }


def tiny_vae(seed: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (config.json, weights)."""
    from diffusers import AutoencoderKLQwenImage21

    with torch.device("meta"):
        vae = AutoencoderKLQwenImage21(**VAE)
    return json.loads(vae.to_json_string()), fixed_init(vae, seed)


def comfy_vae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the VAE under ComfyUI's names."""
    blocks = {name: place for place, name in MIDDLE.items()}

    def comfy_name(key: str) -> str:
        stem, _, leaf = key.rpartition(".")
        for ours, theirs in (
            *QUANT.items(),
            *((f"{part}.{a}", f"{part}.{b}") for part in ("encoder", "decoder") for a, b in ENDS.items()),
        ):
            if stem == theirs:
                return f"{ours}.{leaf}"
        for ours, theirs in RESIDUAL.items():
            stem = re.sub(rf"(resnets\.\d+)\.{theirs}$", rf"\1.{ours}", stem)
        stem = re.sub(r"mid_block\.(\w+\.\d)", lambda m: f"middle.{blocks[m[1]]}", stem)
        stem = re.sub(r"(down|up)_blocks\.(\d+)\.resnets\.", r"\1samples.\2.\1samples.", stem)
        last = {"down": VAE["num_res_blocks"], "up": VAE["num_res_blocks"] + 1}  # type: ignore[operator]
        stem = re.sub(
            r"(down|up)_blocks\.(\d+)\.(?:down|up)sampler\.",
            lambda m: f"{m[1]}samples.{m[2]}.{m[1]}samples.{last[m[1]]}.",
            stem,
        )
        return f"{stem}.{leaf}"

    return {comfy_name(key): tensor for key, tensor in state.items()}


def with_fused_gates(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the denoiser's weights with gate and value fused in one layer, as in some of ComfyUI's files."""
    fused = {name: tensor for name, tensor in state.items() if not re.search(r"img_mlp\.(proj|gate_layer)\.", name)}
    for name, gate in state.items():
        if "img_mlp.gate_layer." in name:
            fused_weight = torch.cat([gate, state[name.replace("gate_layer", "proj")]])
            fused[name.replace("gate_layer", "gate_up")] = fused_weight
    return fused


def tiny_qwen_image_21(seed: int) -> QwenImage21:
    """Return the denoiser alone, with random weights."""
    return tiny_denoiser(QwenImage21, CONFIG, seed)


def full_size_encoder() -> Any:
    """Return Qwen3-VL 8B on the meta device."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = {**TEXT, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    with torch.device("meta"):
        return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config={"out_hidden_size": 4096}))


def full_size_vae() -> Any:
    from diffusers import AutoencoderKLQwenImage21

    with torch.device("meta"):
        return AutoencoderKLQwenImage21()


# Its inputs, and the output of diffusers' transformer

LENGTHS = (24, 13)
SHOWN = ((4, 2), (2, 6))  # sizes of two reference images
PLACES = (5, 9)  # number of text tokens before each reference


def inputs(h: int, w: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents, noise levels, text, and its mask."""
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(2, CONFIG.in_features, h, w, generator=g).requires_grad_()
    text = torch.randn(2, LENGTHS[0], CONFIG.text_width, generator=g).requires_grad_()
    mask = torch.arange(LENGTHS[0])[None] < torch.tensor(LENGTHS)[:, None]
    return latents, torch.tensor([0.125, 0.875]), text, mask.long()


def references(count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(8)
    return [torch.randn(2, CONFIG.in_features, *side, generator=g).requires_grad_() for side in SHOWN[:count]]


def oracle_output(
    theirs: Any, latents: Tensor, sigmas: Tensor, text: Tensor, mask: Tensor, shown: Sequence[Tensor] = ()
) -> Tensor:
    """Run samples separately without padding, as diffusers places the image after the longest caption of a batch."""
    outputs = []
    for b, length in enumerate(mask.sum(1).tolist()):
        images = [image[b : b + 1].flatten(2).transpose(1, 2) for image in (*shown, latents)]
        sides = [(1, *image.shape[-2:]) for image in (*shown, latents)]
        is_slot = torch.zeros(0, dtype=torch.bool)
        states, last = text.new_zeros(1, 0, text.shape[2]), 0
        for place, (_, h, w) in zip((*PLACES[: len(shown)], length), sides, strict=True):
            num_slots = h * w // 4
            is_text = [torch.zeros(place - last, dtype=torch.bool), torch.ones(num_slots, dtype=torch.bool)]
            is_slot = torch.cat([is_slot, *is_text])
            slots = text.new_zeros(1, num_slots if place < length else 0, text.shape[2])  # for the image
            states, last = torch.cat([states, text[b : b + 1, last:place], slots], dim=1), place
        tokens = theirs(
            torch.cat(images, dim=1),
            encoder_hidden_states=states,
            timestep=sigmas[b : b + 1],
            img_shapes=[sides],
            img_mask=is_slot[None],
            return_dict=False,
        )[0]
        outputs.append(tokens[:, -images[-1].shape[1] :].transpose(1, 2).reshape(latents[b : b + 1].shape))
    return torch.cat(outputs)


def full_size() -> QwenImage21:
    return build_on_meta_device(QwenImage21, FULL_SIZE)


def write_full_size(folder: Path) -> list[str]:
    write_qwen3_tokenizer(folder / "tokenizer", MARKS)
    files = {"pretrained_model_name_or_path": full_size(), "text_encoder": full_size_encoder(), "vae": full_size_vae()}
    return write_headers(folder, files)


def diffusers_models() -> dict[str, nn.Module]:
    from diffusers import QwenImage21Transformer2DModel

    return {"transformer": QwenImage21Transformer2DModel()}


def pair() -> Pair:
    ours = tiny_qwen_image_21(7)
    return pair_of(NAMES, ours, diffusers_model(ours), inputs(4, 6), oracle_output)


GATE, FUSED = (f"transformer_blocks.0.img_mlp.{layer}" for layer in ("gate_layer", "gate_up"))
DIT = Dit(
    build=build_tiny_qwen_image_21,
    stored_layer="transformer_blocks.0.attn.to_q",
    mark="<|image_pad|>",
    encoder="Qwen/Qwen3-VL-8B-Instruct",
    names=NAMES,
    model=partial(tiny_qwen_image_21, 7),
    values=lambda: [value.detach() for value in inputs(4, 6)],
    theirs=diffusers_model,
    run_theirs=oracle_output,
    pipeline="QwenImage21Pipeline",
    layer=("lora_unet_transformer_blocks_0_img_mlp_gate_layer", "transformer_blocks.0.img_mlp.gate_layer"),
    blocks=("transformer_blocks.",),
    own=({}, {"in_dims": "[2,2,2,2]"}),
    plain={"attn_dim": "0"},
    trainers=[("musubi-tuner", False), ("ai-toolkit", False), ("SimpleTuner", False)],
    converted=(
        "lora_unet_transformer_blocks_0_img_mlp_gate_layer.lora_down.weight",
        "diffusion_model.transformer_blocks.0.img_mlp.gate_layer.lora_A.weight",
        "transformer.transformer_blocks.0.img_mlp.gate_layer.lora_A.weight",
    ),
    architectures={"files": "Qwen-Image-2.1", "whole": "Qwen-Image-2.1"},  # the second fuses two of the layers
    trained={"": lambda folder: build_tiny_qwen_image_21(folder, 31)},
    training=training_command(
        "--dit {dit}", "--timestep_sampling shift --discrete_flow_shift 3.0", "networks.lora_qwen_image_21"
    ),
    num_adapted=7 * CONFIG.num_blocks,
    saved=("transformer.transformer_blocks.0.img_mlp.gate_layer", CONFIG.width),
    encoder_in_8_bits="--fp8_vl",
    full_size={"": (FULL_SIZE, 7_115_124_736)},
    adapted=("transformer_blocks", "transformer_blocks|img_in|time_text_embed|txt_in|modulation"),
    embedders=r"(?!transformer_blocks)",
    theirs_in_file={"transformer_blocks_0_attn_to_q": (CONFIG.width, CONFIG.width)},
    continued_ranks={"transformer.transformer_blocks.0.attn.to_q": 2},
    prefix="transformer",
    other_kinds="transformer.",
)
BASES = (
    Base(
        name="qwen_image_21",
        script="qwen_image_21_train_network",
        module="networks.lora_qwen_image_21",
        build=lambda folder: build_tiny_qwen_image_21(folder, 62),
        everything=DIT.own[-1],
        written=("qwen_image_21", "Qwen-Image-2.1"),
        deeper={"num_blocks": 6},
        needs_newer="diffusers 0.32.2",
        draws_without_guidance=True,
        default_shift=3.0,
        other_options=("dit_config",),
        deep=Deep(
            lambda: QwenImage21(replace(CONFIG, num_blocks=6)),
            lambda: tuple(value.detach() for value in inputs(4, 6)),
            view_denoiser,
            most_graphs=2,
        ),
        pairs={"qwen_image_21": pair},
        verified={"qwen_image_21": lambda: tiny_denoiser(QwenImage21, replace(CONFIG, num_blocks=3), 73)},
        count_share=0.04,
        merged=("networks.lora_qwen_image_21", {"in_dims": "[2,2,2,2]"}),
        full_size={"Qwen-Image 2.1": (1024, write_full_size)},
        readers=(
            ("qwen-image 2.1, as it is saved", "ANNAN", peft(f"transformer.{GATE}", 4096)),
            ("qwen-image 2.1 generic", "ANNAN", peft("diffusion_model.transformer_blocks.31.attn.to_q", 4096)),
            ("qwen-image 2.1 generic, gates", "NNNAN", peft(f"diffusion_model.{GATE}", 4096)),
            ("qwen-image 2.1 generic, fused", "ANNNN", peft(f"diffusion_model.{FUSED}", 4096)),
            ("qwen-image 2.1 diffusers, fused", "NNNNN", peft(f"transformer.{FUSED}", 4096)),
            ("qwen-image 2.1 kohya", "ANNAN", kohya("unet.transformer_blocks.0.img_mlp.out", 12288)),
            ("qwen-image 2.1 kohya, proj", "NNNAN", kohya("unet.transformer_blocks.0.img_mlp.proj", 4096)),
            ("qwen-image 2.1 kohya, gates", "NNNNN", kohya(f"unet.{GATE}", 4096)),
        ),
        listing=lambda: lora_of(full_size(), linear_paths(NUM_BLOCKS)),
        in_diffusers=InDiffusers(diffusers_models, "QwenImageLoraLoaderMixin"),
        in_comfyui="default",
        dit=DIT,
    ),
)
