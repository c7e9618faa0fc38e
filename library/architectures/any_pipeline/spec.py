"""The `BaseModelSpec` of pipelines that no other package trains. It recognises no file."""

from pathlib import Path
from typing import NoReturn

from library.architectures.any_pipeline.assembly import LATENTS, RECIPE, build
from library.architectures.any_pipeline.options import SCRIPT, PipelineOptions
from library.architectures.any_pipeline.targets import BASE, TARGETS
from library.checkpoints.adapter_names import BaseNames
from library.checkpoints.base_model_spec import DIFFUSERS, NONE, BaseModelSpec, Reader
from library.errors import UserError

ONLY_OWN = "only the pipeline that an adapter was trained on reads it, as docs/any_model.md shows"


def refuse_merging(flag: str, path: Path) -> NoReturn:
    raise UserError(
        f"{flag} {path}: adapters of {SCRIPT} are not merged into a pipeline's folder; load them with "
        "load_lora_weights of the pipeline and call fuse_lora"
    )


def refuse_view(path: Path) -> NoReturn:
    refuse_merging("the base model", path)


SPECS = (
    BaseModelSpec(
        name=BASE,
        title="any pipeline of diffusers",
        called="a model of any pipeline of diffusers",
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
        open_for_merging=refuse_merging,
        view_for_networks=refuse_view,
        adapter_metadata=RECIPE.of_checkpoint,
        ignores=RECIPE.ignores,
    ),
)
