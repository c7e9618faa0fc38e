"""The layers of Anima that adapters target."""

from library.architectures.anima.adapter_names import NAMES
from library.architectures.specs import list_network_arguments
from networks.core.targets.targets import AdapterTargets, Part

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
