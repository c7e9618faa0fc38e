"""The layers of Anima: their names in the original layout, which is ours, in diffusers' two models and in adapter
files, and what adapters target."""

from collections.abc import Iterator, Mapping

from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames, ModuleNames, text_module
from library.models.language_models import LAYER_LINEAR
from library.models.layer_keys import name_layer
from networks.core.targets.targets import AdapterTargets, Part

ADAPTER = "llm_adapter."  # a separate model in diffusers, with the same names inside

TOP: Mapping[str, str] = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "t_embedding_norm": "time_embed.norm",
    "final_layer.linear": "proj_out",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
}
ATTENTION: Mapping[str, str] = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
BLOCK: Mapping[str, str] = {
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in ATTENTION.items()},
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    **{
        f"adaln_modulation_{layer}.{number}": f"norm{place}.linear_{number}"
        for place, layer in enumerate(("self_attn", "cross_attn", "mlp"), start=1)
        for number in (1, 2)
    },
}


def diffusers_path(path: str) -> str:
    """Return diffusers' path of a layer, below "transformer." or "text_conditioner."; other paths raise KeyError."""
    if path.startswith(ADAPTER):
        return f"text_conditioner.{path.removeprefix(ADAPTER)}"
    if path.startswith("blocks."):
        _, number, layer = path.split(".", 2)
        return f"transformer.transformer_blocks.{number}.{BLOCK[layer]}"
    return f"transformer.{TOP[path]}"


NUM_BLOCKS, NUM_ADAPTER_BLOCKS, NUM_LAYER_LINEARS = 28, 6, 28  # of the first release; others are deeper


ADAPTER_BLOCK = (
    *(f"{layer}.{name}_proj" for layer in ("self_attn", "cross_attn") for name in ("q", "k", "v", "o")),
    *("mlp.0", "mlp.2"),
)


def denoiser_paths() -> Iterator[str]:
    """Yield the path of every Linear layer that an adapter may target."""
    yield from (path for path in TOP if not path.endswith("_norm"))
    for number in range(NUM_BLOCKS):
        yield from (f"blocks.{number}.{layer}" for layer in BLOCK if not layer.endswith("_norm"))
    for number in range(NUM_ADAPTER_BLOCKS):
        yield from (f"llm_adapter.blocks.{number}.{layer}" for layer in ADAPTER_BLOCK)


def denoiser_module(path: str) -> ModuleNames:
    return name_layer(path, (diffusers_path(path),), prefix="")


def qwen3_module(path: str) -> ModuleNames:
    return text_module(path, "lora_te", "qwen3_06b", "text_encoder", level="model.")


NAMES = BaseNames(
    "anima",
    (
        *map(denoiser_module, denoiser_paths()),
        *(qwen3_module(f"layers.{n}.{name}") for n in range(NUM_LAYER_LINEARS) for name in LAYER_LINEAR),
    ),
    stacks=("lora_unet_blocks", "lora_unet_llm_adapter_blocks", "lora_te_layers"),
)


LEFT_OUT = (r".*(_modulation|_norm|_embedder|final_layer).*",)  # unless include_patterns includes them again


TARGETS = AdapterTargets(
    denoiser=Part(
        "lora_unet",
        blocks=("Block", "PatchEmbed", "TimestepEmbedding", "FinalLayer"),
        exclude=LEFT_OUT,
        extra_blocks={"train_llm_adapter": ("LLMAdapterTransformerBlock",)},
    ),
    text_encoders=(
        Part(
            "lora_te",
            # sd-scripts' list; transformers has only the first two classes.
            blocks=("Qwen3Attention", "Qwen3MLP", "Qwen3SdpaAttention", "Qwen3FlashAttention2"),
            exclude=LEFT_OUT,
        ),
    ),
    expressions="path",
    names=NAMES,
    elsewhere=list_network_arguments,
)
