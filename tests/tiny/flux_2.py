"""A tiny but complete FLUX.2 model, klein or dev: three files, one file of all, or a diffusers folder."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from library.architectures.flux_2.layers import KEYS, NAMES, NUM_BLOCKS
from library.architectures.flux_2.model import Flux2, Flux2Config
from library.architectures.flux_2.reference import diffusers_config, diffusers_model, diffusers_state
from library.models.adapter_views import view_denoiser
from library.models.loading import build_on_meta_device
from library.models.vae.flux_2 import ORIGINAL
from tests.tiny import zimage
from tests.tiny.base import Base, Compared, Deep, Dit, InDiffusers, Pair, pair_of, training_command
from tests.tiny.flux import ldm_vae
from tests.tiny.headers import write_headers
from tests.tiny.init import fixed_init
from tests.tiny.keys import kohya, lora_of, peft
from tests.tiny.parts import BASE, Parts, prefixed, tiny_denoiser, write_files, write_folder, write_whole
from tests.tiny.sd import VAE as SD_VAE
from tests.tiny.zimage import MERGES, write_qwen3_tokenizer

Layout = Literal["files", "whole", "diffusers"]

CONFIG = Flux2Config(
    in_features=128,
    width=48,
    head_width=16,
    mlp_width=144,
    text_width=48,
    num_double=2,
    num_single=2,
    has_guidance=False,
)
KLEIN_4B = Flux2Config(
    in_features=128,
    width=3072,
    head_width=128,
    mlp_width=9216,
    text_width=7680,
    num_double=5,
    num_single=20,
    has_guidance=False,
)
KLEIN_9B = replace(KLEIN_4B, width=4096, mlp_width=12288, text_width=12288, num_double=8, num_single=24)
DEV = replace(KLEIN_4B, width=6144, mlp_width=18432, text_width=15360, num_double=8, num_single=48, has_guidance=True)
QWEN3 = {
    **zimage.QWEN3,
    "hidden_size": CONFIG.text_width // 3,
    "intermediate_size": 24,
    "num_hidden_layers": 29,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MISTRAL = {
    "hidden_size": CONFIG.text_width // 3,
    "intermediate_size": 24,
    "num_hidden_layers": 31,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "rope_theta": 1_000_000_000.0,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}
VAE = {key: value for key, value in SD_VAE.items() if key != "scaling_factor"} | {"latent_channels": 32}
QWEN3_SPECIAL = (*zimage.SPECIAL, "<think>", "</think>")
MISTRAL_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]")
MISTRAL_TEMPLATE = (  # like Mistral's, for a system and a user message
    "{{ bos_token }}{% for message in messages %}{% set mark = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' "
    "%}{{ '[' + mark + ']' + message.content[0].text + '[/' + mark + ']' }}{% endfor %}"
)


def build_tiny_flux_2(
    folder: Path, seed: int, layout: Layout = "files", is_dev: bool = False, flag: str = BASE
) -> list[str]:
    """Write a tiny model into `folder` and return the options that select it, with the base model as `flag`. Equal
    seeds give equal weights in every layout."""
    write = write_mistral_tokenizer if is_dev else lambda path: write_qwen3_tokenizer(path, QWEN3_SPECIAL)
    parts = tiny_parts(seed, write(folder / "tokenizer"), is_dev)
    if layout == "diffusers":
        klein = {"_class_name": "Flux2KleinPipeline", "is_distilled": False}
        return write_folder(
            folder,
            {"_class_name": "Flux2Pipeline"} if is_dev else klein,
            parts,
            lambda state: diffusers_state(state, CONFIG),
            flag,
        )
    denoiser, encoder, vae = parts["transformer"][1], parts["text_encoder"][1], original_vae(parts["vae"][1])
    if layout == "whole":
        name = "mistral3_24b" if is_dev else "qwen3_4b"
        text = prefixed(f"text_encoders.{name}.transformer.model.", encoder)
        return write_whole(folder, flag, "flux2", denoiser, vae, text)
    text = prefixed("language_model.model." if is_dev else "model.", encoder)
    files = {"--vae": ("ae", vae), "--text_encoder": ("encoder", text)}
    return write_files(folder, {flag: ("flux2-tiny", denoiser), **files})


def tiny_parts(seed: int, num_words: int, is_dev: bool) -> Parts:
    """Return (config.json, weights) by diffusers' folder name; the denoiser has our names."""
    from transformers import MistralConfig, MistralModel, Qwen3Config, Qwen3Model

    sizes = {**(MISTRAL if is_dev else QWEN3), "vocab_size": num_words}
    with torch.device("meta"):
        encoder = MistralModel(MistralConfig(**sizes)) if is_dev else Qwen3Model(Qwen3Config(**sizes))
    denoiser = tiny_flux_2(seed, is_dev)
    kind = {"model_type": "mistral", "architectures": ["MistralModel"]} if is_dev else {"model_type": "qwen3"}
    return {
        "transformer": (diffusers_config(denoiser.config), denoiser.state_dict()),
        "vae": tiny_vae(seed + 1),
        "text_encoder": ({**sizes, "architectures": ["Qwen3Model"], **kind}, fixed_init(encoder, seed + 2)),
    }


def tiny_vae(seed: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (config.json, weights); its batch norm statistics are like trained ones, with positive variances."""
    from diffusers import AutoencoderKLFlux2

    with torch.device("meta"):
        vae = AutoencoderKLFlux2(**VAE)
    state = fixed_init(vae, seed)
    state["bn.running_var"] = 0.5 + 5 * state["bn.running_var"].abs()
    state["bn.num_batches_tracked"] = torch.tensor(7)
    return json.loads(vae.to_json_string()), state


def full_size_encoder(release: str) -> Any:
    """Return the whole text encoder of a release on the meta device."""
    from transformers import MistralConfig, MistralModel, Qwen3Config, Qwen3Model

    sizes: dict[str, Any] = {
        "dev": {"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "vocab_size": 131072},
        "klein-4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936},
        "klein-9b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936},
    }[release]
    config, model = (MistralConfig, MistralModel) if release == "dev" else (Qwen3Config, Qwen3Model)
    with torch.device("meta"):
        return model(config(**sizes, num_attention_heads=32, num_key_value_heads=8, head_dim=128))


def full_size_vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    with torch.device("meta"):
        return AutoencoderKLFlux2()


def original_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the VAE in the layout of ae.safetensors."""
    converted = ldm_vae(state)
    for ours, theirs in ORIGINAL.items():
        for key in [key for key in converted if key.startswith(theirs)]:
            converted[ours + key.removeprefix(theirs)] = converted.pop(key)
    return converted


def write_mistral_tokenizer(folder: Path) -> int:
    """Write Mistral's tokenizer with all bytes, a few words and the chat markers; return its vocabulary size."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    words = [*MISTRAL_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", additional_special_tokens=list(MISTRAL_SPECIAL[4:]), **special
    )
    fast.chat_template = MISTRAL_TEMPLATE
    fast.save_pretrained(str(folder))
    return len(words)


def tiny_flux_2(seed: int, is_dev: bool = False) -> Flux2:
    """Return the denoiser alone, with random weights."""
    return tiny_denoiser(Flux2, replace(CONFIG, has_guidance=is_dev), seed)


# Its inputs, and the output of diffusers' transformer

NUM_TEXT = 24


def inputs(h: int, w: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents, noise levels, text, guidance."""
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(2, CONFIG.in_features, h, w, generator=g).requires_grad_()
    text = torch.randn(2, NUM_TEXT, CONFIG.text_width, generator=g).requires_grad_()
    return latents, torch.tensor([0.125, 0.875]), text, torch.tensor([1.0, 4.0])


def oracle_output(theirs: Any, latents: Tensor, sigmas: Tensor, text: Tensor, guidance: Tensor) -> Tensor:
    """Return diffusers' output, with tokens and positions built as in its pipeline."""
    from diffusers import Flux2KleinPipeline as Pipeline

    tokens = theirs(
        Pipeline._pack_latents(latents),
        encoder_hidden_states=text,
        timestep=sigmas,
        img_ids=Pipeline._prepare_latent_ids(latents),
        txt_ids=Pipeline._prepare_text_ids(text),
        guidance=guidance if theirs.config.guidance_embeds else None,
        return_dict=False,
    )[0]
    return tokens.transpose(1, 2).reshape(latents.shape)  # type: ignore[no-any-return]


def write_full_size(config: Flux2Config, release: str, folder: Path) -> list[str]:
    if release == "dev":
        write_mistral_tokenizer(folder / "tokenizer")
    else:
        write_qwen3_tokenizer(folder / "tokenizer", QWEN3_SPECIAL)
    denoiser, encoder = build_on_meta_device(Flux2, config), full_size_encoder(release)
    files = {"pretrained_model_name_or_path": denoiser, "text_encoder": encoder, "vae": full_size_vae()}
    return write_headers(folder, files)


def diffusers_models() -> dict[str, nn.Module]:
    from diffusers import Flux2Transformer2DModel

    return {"transformer": Flux2Transformer2DModel(**diffusers_config(DEV))}


def pair() -> Pair:
    ours = tiny_flux_2(7, is_dev=True)
    return pair_of(NAMES, ours, diffusers_model(ours), inputs(3, 5), oracle_output)


DEEPER = {"num_double": 4, "num_single": 6}
DIT = Dit(
    build=build_tiny_flux_2,
    stored_layer="double_blocks.0.img_attn.qkv",
    mark="<think>",
    encoder="Qwen/Qwen3-4B",
    names=NAMES,
    model=partial(tiny_flux_2, 7, is_dev=True),
    values=lambda: [value.detach() for value in inputs(3, 5)],
    theirs=diffusers_model,
    run_theirs=oracle_output,
    pipeline="Flux2Pipeline",
    layer=("lora_unet_single_blocks_0_linear2", "single_blocks.0.linear2"),
    blocks=("double_blocks.", "single_blocks.", "transformer_blocks.", "single_transformer_blocks."),
    own=({}, {"in_dims": "[2,2,2,2,2,2,2]"}),
    plain={"split_qkv": "True"},
    trainers=[
        ("musubi-tuner", False), ("ai-toolkit", False), ("ai-toolkit", True), ("SimpleTuner", True),
        ("OneTrainer, kohya", True), ("OneTrainer", True),
    ],
    converted=(
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    ),
    architectures={"files": "Flux.2-klein-4b", "whole": "Flux.2-dev"},
    trained={
        "klein-base-4b": lambda folder: build_tiny_flux_2(folder, 31),
        "dev": lambda folder: build_tiny_flux_2(folder, 32, is_dev=True),
    },
    training=training_command(
        "--dit {dit} --vae {vae} --text_encoder {text}",
        "--timestep_sampling flux2_shift",
        "networks.lora_flux_2",
    ),
    num_adapted=8 * CONFIG.num_double + 2 * CONFIG.num_single,
    saved=("diffusion_model.double_blocks.0.img_attn.qkv", CONFIG.width),
    full_size={
        "klein 4B": (KLEIN_4B, 3_875_544_576),
        "klein 9B": (KLEIN_9B, 9_078_581_248),
        "dev": (DEV, 32_223_281_152),
    },
    adapted=(r".*_blocks\.", "(?!final_layer)"),
    embedders=r"(?!.*_blocks\.)",
    theirs_in_file={
        "double_blocks_0_img_attn_qkv": (3 * CONFIG.width, CONFIG.width),
        "double_blocks_0_txt_attn_proj": (CONFIG.width, CONFIG.width),
    },
    continued_ranks={f"diffusion_model.double_blocks.0.{part}": 2 for part in ("img_attn.qkv", "txt_attn.proj")},
)  # fmt: skip
BASES = (
    Base(
        name="flux_2",
        script="flux_2_train_network",
        module="networks.lora_flux_2",
        build=lambda folder: build_tiny_flux_2(folder, 61),
        everything=DIT.own[-1],
        written=("flux_2", "Flux.2-klein-4b"),
        releases=tuple(("--model_version", v) for v in ("klein-4b", "klein-base-4b", "klein-base-9b", "dev")),
        deeper=DEEPER,
        needs_newer="diffusers 0.32.2",
        default_shift=math.exp(1.15),  # at 4096 tokens, the larger end
        compared={
            f"flux_2 {name}": Compared(
                partial(tiny_flux_2, 1, is_dev),
                diffusers_model,
                {str(size): partial(inputs, *size) for size in ((8, 8), (3, 7), (9, 2))},  # each pixel is a token
                oracle_output,
            )
            for name, is_dev in (("klein", False), ("dev", True))
        },
        deep=Deep(
            lambda: Flux2(replace(CONFIG, **DEEPER)),
            lambda: tuple(value.detach() for value in inputs(4, 6)),
            view_denoiser,
            most_graphs=4,
        ),
        pairs={"flux_2": pair},
        verified={
            "flux_2 klein": lambda: tiny_denoiser(Flux2, replace(CONFIG, num_double=3, num_single=4), 70),
            "flux_2 dev": lambda: tiny_denoiser(
                Flux2, replace(CONFIG, num_double=3, num_single=4, has_guidance=True), 71
            ),
        },
        merged=("networks.lora_flux_2", {"in_dims": "[2,2,2,2,2,2,2]"}),
        full_size={
            "FLUX.2 klein 4B": (1024, partial(write_full_size, KLEIN_4B, "klein-4b")),
            "FLUX.2 klein 9B": (1024, partial(write_full_size, KLEIN_9B, "klein-9b")),
            "FLUX.2 dev": (1024, partial(write_full_size, DEV, "dev")),
        },
        readers=(
            ("flux.2, as it is saved", "ANNAN", peft("diffusion_model.double_blocks.0.img_attn.qkv", 4096)),
            ("flux.2 klein 4B", "ANNAN", peft("diffusion_model.single_blocks.0.linear2", 12288)),
            ("flux.2 diffusers", "ANNAN", peft("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", 3072)),
            ("flux.2 kohya", "ANNAN", kohya("unet.double_blocks.0.txt_mlp.2", 9216)),
            ("flux.2 kohya, modulation", "ANNNN", kohya("unet.single_stream_modulation.lin", 3072)),
            ("flux.2 diffusers, modulation", "NNNAN", peft("transformer.single_stream_modulation.linear", 3072)),
        ),
        listing=lambda: lora_of(build_on_meta_device(Flux2, DEV), KEYS.linear_paths(NUM_BLOCKS)),
        in_diffusers=InDiffusers(diffusers_models, "Flux2LoraLoaderMixin"),
        in_comfyui="default",
        dit=DIT,
    ),
)
