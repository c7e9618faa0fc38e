"""The `BaseModelSpec` of Anima."""

from library.architectures.anima.assembly import LATENTS, RECIPE, build, build_objective
from library.architectures.anima.layers import NAMES, TARGETS
from library.architectures.anima.merging import open_base_model, view_for_networks
from library.architectures.anima.options import AnimaOptions
from library.checkpoints.base_model_spec import ALL, DIFFUSERS, GENERIC, KOHYA, NONE, BaseModelSpec, Gap, Reader, Sign

LOST_NAMES = Gap(
    KOHYA,
    r".*_(cross_attn_.*|self_attn_output_proj|adaln_modulation_.*|t_embedder_.*|final_layer_.*|llm_adapter_.*)",
    "under kohya's names it finds only q, k, v of self_attn, mlp and x_embedder",
)

SPECS = (
    BaseModelSpec(
        name="anima",
        title="Anima",
        called="an Anima",
        script="anima_train_network.py",
        options=AnimaOptions,
        build=build,
        latents=LATENTS,
        objective=build_objective,
        checkpoint=(Sign(r"llm_adapter\."),),
        adapter=(
            Sign(r"_llm_adapter_|(unet|diffusion_model)_blocks_\d+_(self_attn|cross_attn|mlp_layer\d)_"),
            Sign(r"^(transformer_transformer_blocks_\d+_attn1_|text_conditioner_)"),
        ),
        version=r"anima",
        architecture=r"anima",
        pipelines=("Anima",),
        readers={
            "ComfyUI": Reader(KOHYA | GENERIC, KOHYA | GENERIC),
            "diffusers": Reader(GENERIC | DIFFUSERS, NONE),
            "stable-diffusion.cpp": Reader(ALL - DIFFUSERS, NONE, gaps=(LOST_NAMES,)),
        },
        names=NAMES,
        network_arguments=TARGETS.arguments,
        open_for_merging=open_base_model,
        view_for_networks=view_for_networks,
        adapter_metadata=RECIPE.of_checkpoint,
        ignores=RECIPE.ignores,
    ),
)
