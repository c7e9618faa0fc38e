"""The `BaseModelSpec` of pipelines that no other package trains. It recognises no file."""

from library.architectures.any_pipeline.assembly import LATENTS, RECIPE, build, build_to_draw
from library.architectures.any_pipeline.folder import open_for_merging, view_for_networks
from library.architectures.any_pipeline.options import SCRIPT, PipelineOptions
from library.architectures.any_pipeline.published_names import find_published, names_of
from library.architectures.any_pipeline.targets import BASE, TARGETS
from library.checkpoints.adapter_names import BaseNames
from library.checkpoints.base_model_spec import DIFFUSERS, NONE, BaseModelSpec, Reader

ONLY_OWN = "only the pipeline that an adapter was trained on reads it, as docs/any_model.md shows"


SPECS = (
    BaseModelSpec(
        name=BASE,
        title="any pipeline of diffusers",
        called="another diffusers pipeline's",
        script=SCRIPT,
        options=PipelineOptions,
        build=build,
        latents=LATENTS,
        checkpoint=(),
        adapter=(),
        version=r"any_pipeline$",
        architecture=r"\w+Pipeline",
        pipelines=(),
        readers={"diffusers": Reader(DIFFUSERS, NONE, refuses=lambda modules: ONLY_OWN)},
        names=BaseNames(BASE, ()),
        network_arguments=TARGETS.arguments,
        open_for_merging=open_for_merging,
        view_for_networks=view_for_networks,
        adapter_metadata=RECIPE.of_checkpoint,
        ignores=RECIPE.ignores,
        build_to_draw=build_to_draw,
        names_of=names_of,
        find_published=find_published,
    ),
)
