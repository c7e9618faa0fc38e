"""The `BaseModelSpec` of FLUX.2."""

from library.architectures.flux_2.adapter_names import NAMES, denoiser_module
from library.architectures.flux_2.assembly import LATENTS, RECIPE, build, build_objective
from library.architectures.flux_2.checkpoint_keys import DIFFUSERS_MARK, KEYS
from library.architectures.flux_2.load import MARK, MODEL
from library.architectures.flux_2.model import Flux2, read_config
from library.architectures.flux_2.options import Flux2Options
from library.architectures.flux_2.releases import modelspec_architecture, recognise_release
from library.architectures.flux_2.targets import TARGETS
from library.checkpoints.base_model_spec import ALL, DIFFUSERS, KOHYA, NONE, BaseModelSpec, Gap, Reader, Sign
from library.checkpoints.weights import Weights, configure
from library.models.transformer_file import TransformerFile

BLOCKS = (
    r"_(double|single)_blocks_\d+_"
    r"|_transformer_blocks_\d+_(attn_(to_(q|k|v|out_0|add_out)|add_[qkv]_proj)|ff(_context)?_linear_in)_"
)
WIDTHS = (4096, 6144)  # of klein 9B and dev; klein 4B is as wide as FLUX.1
# klein 4B is as wide as FLUX.1, but its SwiGLU has another width inside.
KLEIN_4B_MLP, KLEIN_4B_SINGLE = 9216, 12288  # inputs of the second layers of its MLP and of its single blocks

NO_NUMBERS = Gap(
    DIFFUSERS,
    r"transformer_(time_guidance_embed|(double|single)_stream_modulation)_.*",
    "it does not find the embeddings of noise level and guidance and the modulation under diffusers' names",
)
NO_MODULATION = Gap(
    KOHYA,
    r"lora_unet_(guidance_in|(double|single)_stream_modulation|final_layer_adaLN_modulation)_.*",
    "under kohya's names it does not find the embedding of guidance and the modulation",
)


def architecture_of(weights: Weights) -> str:
    return modelspec_architecture(recognise_release(configure(weights, read_config), None, weights.origin))


FILE = TransformerFile(
    base="flux_2",
    title=MODEL,
    architecture=architecture_of,
    mark=MARK,
    diffusers_mark=DIFFUSERS_MARK,
    is_layer=KEYS.is_linear,
    name=denoiser_module,
    build=Flux2,
    read_config=read_config,
)

SPECS = (
    BaseModelSpec(
        name="flux_2",
        title="FLUX.2",
        called="a FLUX.2",
        script="flux_2_train_network.py",
        options=Flux2Options,
        build=build,
        latents=LATENTS,
        objective=build_objective,
        checkpoint=(Sign(r"(^|\.)(single|double)_stream_modulation(_img|_txt)?\.lin"),),
        adapter=(
            Sign(r"_(single|double)_stream_modulation_|_attn_to_qkv_mlp_proj|_ff(_context)?_linear_(in|out)_"),
            *(Sign(BLOCKS, width=width) for width in WIDTHS),
            Sign(r"_double_blocks_\d+_(img|txt)_mlp_2_", width=KLEIN_4B_MLP),
            Sign(r"_single_blocks_\d+_linear2_", width=KLEIN_4B_SINGLE),
            Sign(r"_single_transformer_blocks_\d+_attn_to_out_"),
        ),
        version=r"flux_2",
        architecture=r"(?i)flux\.2",
        pipelines=("Flux2",),
        readers={
            "ComfyUI": Reader(ALL, NONE, gaps=(NO_NUMBERS,)),
            "diffusers": Reader(ALL, NONE, gaps=(NO_MODULATION,)),
        },
        names=NAMES,
        network_arguments=TARGETS.arguments,
        open_for_merging=FILE.open,
        view_for_networks=FILE.view_for_networks,
        adapter_metadata=RECIPE.of_checkpoint,
        ignores=RECIPE.ignores,
    ),
)
