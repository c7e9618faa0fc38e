"""The `BaseModelSpec` of FLUX.3 Image Klein."""

from library.architectures.flux_3.assembly import ARCHITECTURE, LATENTS, RECIPE, build, build_objective
from library.architectures.flux_3.layer_names import DIFFUSERS_MARK, KEYS, MARK, NAMES, TARGETS, denoiser_module
from library.architectures.flux_3.load import MODEL
from library.architectures.flux_3.model import Flux3, read_config
from library.architectures.flux_3.options import Flux3Options
from library.checkpoints.base_model_spec import DIFFUSERS, GENERIC, NONE, BaseModelSpec, Gap, Reader, Sign
from library.models.transformer_file import TransformerFile

NO_EMBEDDERS = Gap(
    GENERIC,
    r"diffusion_model_((emb_in|time_in|ref_time_in|(early|single)_stream_modulations|final_layer)_.*|txt_in)",
    "under generic names it finds the layers of the blocks alone",
)

FILE = TransformerFile(
    base="flux_3",
    title=MODEL,
    architecture=ARCHITECTURE,
    mark=MARK,
    diffusers_mark=DIFFUSERS_MARK,
    is_layer=KEYS.is_linear,
    name=denoiser_module,
    build=Flux3,
    read_config=read_config,
)

SPECS = (
    BaseModelSpec(
        name="flux_3",
        title=MODEL,
        called="a FLUX.3 Image Klein",
        script="flux_3_train_network.py",
        options=Flux3Options,
        build=build,
        latents=LATENTS,
        objective=build_objective,
        checkpoint=(Sign(r"(^|\.)early_stream_modulations\."),),
        adapter=(
            Sign(r"_(early_stream_modulations|single_stream_modulations|emb_in|x_embedders|ref_time_in)_"),
            Sign(r"_mode_blocks_|_single_blocks_\d+_([qkv]_proj|attn_out|mlp_in|mlp_out)_"),
            Sign(r"_single_transformer_blocks_\d+_(attn_to_out_0|ff_linear_(in|out))_"),
        ),
        version=r"FLUX\.3",
        architecture=r"(?i)flux\.3",
        pipelines=("Flux3",),
        readers={
            "ComfyUI": Reader(GENERIC, NONE),
            "diffusers": Reader(GENERIC | DIFFUSERS, NONE, gaps=(NO_EMBEDDERS,)),
        },
        names=NAMES,
        network_arguments=TARGETS.arguments,
        open_for_merging=FILE.open,
        view_for_networks=FILE.view_for_networks,
        adapter_metadata=RECIPE.of_checkpoint,
        ignores=RECIPE.ignores,
    ),
)
