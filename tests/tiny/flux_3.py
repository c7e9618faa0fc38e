"""A tiny but complete FLUX.3 Image Klein model: three files, one file of all, or a diffusers folder."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from library.architectures.flux_3.layers import KEYS, NAMES, NUM_BLOCKS
from library.architectures.flux_3.model import Flux3, Flux3Config
from library.architectures.flux_3.options import SHIFT
from library.architectures.flux_3.reference import diffusers_model
from library.architectures.flux_3.text import LAYERS
from library.models.adapter_views import view_denoiser
from library.models.loading import build_on_meta_device
from library.models.patches import patchify, unpatchify
from tests.tiny.base import Base, Compared, Deep, InDiffusers, Pair, pair_of
from tests.tiny.flux_2 import full_size_vae, original_vae, tiny_vae
from tests.tiny.headers import write_headers
from tests.tiny.keys import kohya, lora_of, peft
from tests.tiny.krea2 import full_size_qwen3_vl
from tests.tiny.parts import BASE, Parts, prefixed, tiny_denoiser, write_files, write_folder, write_whole
from tests.tiny.qwen3_vl import MARKS, deep_vision, tiny_qwen3_vl
from tests.tiny.zimage import write_qwen3_tokenizer

Layout = Literal["files", "whole", "diffusers"]

CONFIG = Flux3Config(
    in_features=128, width=48, head_width=16, mlp_width=144, text_width=16 * len(LAYERS), num_mode=2, num_single=2
)
FULL_SIZE = Flux3Config(
    in_features=128, width=3072, head_width=128, mlp_width=9216, text_width=20480, num_mode=5, num_single=28
)
QWEN3_VL = {
    "hidden_size": CONFIG.text_width // len(LAYERS),
    "intermediate_size": 24,
    "num_hidden_layers": 33,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [2, 1, 1]},
}


def build_tiny_flux_3(
    folder: Path, seed: int, layout: Layout = "files", flag: str = BASE, is_distilled: bool = False
) -> list[str]:
    """Write a tiny model into `folder` and return the options that select it, with the base model as `flag`. Equal
    seeds give equal weights in every layout."""
    parts = tiny_parts(seed, write_qwen3_tokenizer(folder / "tokenizer", MARKS), is_distilled)
    if layout == "diffusers":
        return write_folder(folder, {"_class_name": "Flux3ModularPipeline"}, parts, diffusers_state, flag)
    denoiser = {**parts["transformer"][1], "repa_projectors.0.weight": torch.ones(2, 2)}
    encoder, vae = parts["text_encoder"][1], original_vae(parts["vae"][1])
    if layout == "whole":
        language = {key.removeprefix("language_"): tensor for key, tensor in encoder.items()}
        text = prefixed("text_encoders.qwen3vl_4b.transformer.", language)
        return write_whole(folder, flag, "flux3", denoiser, vae, text)
    files = {"--vae": ("flux2-vae", vae), "--text_encoder": ("qwen3vl_4b", prefixed("model.", encoder))}
    return write_files(folder, {flag: ("flux3-image-klein", denoiser), **files})


def tiny_parts(seed: int, num_words: int, is_distilled: bool) -> Parts:
    """Return (config.json, weights) by diffusers' folder name; the denoiser has our names."""
    encoder = tiny_qwen3_vl(seed + 2, num_words, deep_vision(2, (0, 1)), **QWEN3_VL)
    denoiser = tiny_flux_3(seed, is_distilled)
    return {
        "transformer": (json.loads(diffusers_model(denoiser).to_json_string()), denoiser.state_dict()),
        "vae": tiny_vae(seed + 1),
        "text_encoder": (json.loads(encoder.config.to_json_string()), encoder.state_dict()),
    }


def tiny_flux_3(seed: int, is_distilled: bool = False) -> Flux3:
    """Return the denoiser alone, with random weights."""
    return tiny_denoiser(Flux3, replace(CONFIG, has_target=is_distilled), seed)


def diffusers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under diffusers' names, converted by diffusers' own converter of single files."""
    from diffusers.loaders.single_file_utils import convert_flux3_transformer_checkpoint_to_diffusers

    return dict(convert_flux3_transformer_checkpoint_to_diffusers({k: tensor.clone() for k, tensor in state.items()}))


# Its inputs, and the output of diffusers' transformer

NUM_TEXT = 24


def inputs(h: int, w: int) -> tuple[Tensor, ...]:
    """Return latents, noise levels, text, its mask."""
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(2, CONFIG.in_features, h, w, generator=g).requires_grad_()
    text = torch.randn(2, NUM_TEXT, CONFIG.text_width, generator=g).requires_grad_()
    return latents, torch.tensor([0.125, 0.875]), text, torch.ones(2, NUM_TEXT, dtype=torch.long)


def edit_inputs(h: int, w: int) -> tuple[Tensor, ...]:
    """Return `inputs`, the noise levels at which the step ends, and two references."""
    g = torch.Generator().manual_seed(1)
    references = [torch.randn(2, CONFIG.in_features, *side, generator=g) for side in ((3, 2), (2, 5))]
    return *inputs(h, w), torch.tensor([0.0, 0.75]), *references


def edit(
    denoiser: Flux3, latents: Tensor, sigmas: Tensor, text: Tensor, mask: Tensor, targets: Tensor, *references: Tensor
) -> Tensor:
    velocity: Tensor = denoiser(latents, sigmas, text, mask, references, targets)
    return velocity


def oracle_output(
    theirs: Any,
    latents: Tensor,
    sigmas: Tensor,
    text: Tensor,
    mask: Tensor,
    targets: Tensor | None = None,
    *references: Tensor,
) -> Tensor:
    """Return diffusers' output, with positions built by its pipeline's functions."""
    from diffusers.modular_pipelines.flux3.before_denoise import _prepare_image_ids

    h, w = latents.shape[-2:]
    zero = torch.arange(1)
    more: dict[str, Any] = {}
    if references:
        ids = [_prepare_image_ids(*ref.shape[-2:], 0.5, l_coord=-(1 + i)) for i, ref in enumerate(references)]
        tokens = torch.cat([patchify(reference, 1) for reference in references], dim=1)
        more = {"image_cond_hidden_states": tokens, "image_cond_ids": torch.cat(ids)}
    if theirs.config.flow_map:
        more["target_timestep"] = sigmas if targets is None else targets
    output = theirs(
        patchify(latents, 1),
        encoder_hidden_states=text,
        timestep=sigmas,
        img_ids=_prepare_image_ids(h, w, 0.5),
        txt_ids=torch.cartesian_prod(zero, zero, zero, torch.arange(text.shape[1])),
        return_dict=False,
        **more,
    )[0]
    return unpatchify(output, h, w, 1)


def full_size() -> Flux3:
    return build_on_meta_device(Flux3, FULL_SIZE)


def write_full_size(folder: Path) -> list[str]:
    write_qwen3_tokenizer(folder / "tokenizer", MARKS)
    files = {"pretrained_model_name_or_path": full_size(), "text_encoder": full_size_qwen3_vl(), "vae": full_size_vae()}
    return write_headers(folder, files)


def diffusers_models() -> dict[str, nn.Module]:
    from diffusers import Flux3Transformer2DModel

    return {"transformer": Flux3Transformer2DModel(flow_map=True)}


def pair() -> Pair:
    ours = tiny_flux_3(7, is_distilled=True)
    return pair_of(NAMES, ours, diffusers_model(ours), inputs(3, 5), oracle_output)


DEEPER = {"num_mode": 3, "num_single": 6}
BASES = (
    Base(
        name="flux_3",
        script="flux_3_train_network",
        module="networks.lora",
        build=lambda folder: build_tiny_flux_3(folder, 66),
        everything={"in_dims": "[2,2,0,2,2,2,2]"},
        written=("FLUX.3", "Flux.3-image-klein"),
        deeper=DEEPER,
        needs_newer="transformers 4.54.1",
        default_shift=SHIFT,
        compared={
            f"flux_3 {name}{mode}": Compared(
                partial(tiny_flux_3, 1, is_distilled),
                diffusers_model,
                {str(size): partial(values, *size) for size in ((8, 8), (3, 7), (9, 2))},  # each pixel is a token
                oracle_output,
                run,
                least=0.05,
            )
            for name, is_distilled in (("base", False), ("distilled", True))
            for mode, values, run in (("", inputs, Flux3.__call__), (" with references", edit_inputs, edit))
        },
        deep=Deep(
            lambda: Flux3(replace(CONFIG, **DEEPER, has_references=False)),
            lambda: tuple(value.detach() for value in inputs(4, 6)),
            view_denoiser,
            most_graphs=6,
        ),
        pairs={"flux_3": pair},
        count_share=0.05,  # copies of eight states per caption token, which fake tensors do not need
        verified={
            f"flux_3 {name}": partial(
                tiny_denoiser,
                Flux3,
                replace(CONFIG, num_single=3, has_target=has_target, has_references=has_references),
                74,
            )
            for name, has_target, has_references in (("base", False, False), ("distilled", True, True))
        },
        merged=("networks.lora", {"in_dims": "[2,2,0,2,2,2,2]"}),
        full_size={"FLUX.3 Image Klein": (1024, write_full_size)},
        readers=(
            ("flux.3, as it is saved", "ANNAN", peft("diffusion_model.single_blocks.0.q_proj", 3072)),
            ("flux.3, mode blocks", "ANNAN", peft("diffusion_model.content_mode_blocks.image.4.mlp_out", 9216)),
            ("flux.3, modulation", "ANNNN", peft("diffusion_model.early_stream_modulations.txt.lin", 3072)),
            ("flux.3 diffusers", "NNNAN", peft("transformer.mode_blocks.image.0.attn.to_q", 3072)),
            ("flux.3 kohya", "NNNNN", kohya("unet.single_blocks.0.mlp_in", 3072)),
        ),
        listing=lambda: lora_of(
            build_on_meta_device(Flux3, replace(FULL_SIZE, has_target=True)), KEYS.linear_paths(NUM_BLOCKS)
        ),
        in_diffusers=InDiffusers(diffusers_models, "Flux3LoraLoaderMixin"),
        in_layouts=build_tiny_flux_3,
    ),
)
