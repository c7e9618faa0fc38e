"""The spec of Knots, which is all that code outside this package uses."""

from library.architectures.knots.assembly import LATENTS, RECIPE, build
from library.architectures.knots.layers import NAMES, TARGETS
from library.architectures.knots.merging import open_base_model, view_for_networks
from library.architectures.knots.options import KnotsOptions
from library.checkpoints.base_model_spec import GENERIC, KOHYA, NONE, BaseModelSpec, Reader, Sign

SPECS = (
    BaseModelSpec(
        name="knots",
        title="Knots 1",
        called="a Knots",
        script="knots_train_network.py",
        options=KnotsOptions,
        build=build,
        latents=LATENTS,
        checkpoint=(Sign(r"\bknots\.\d+\."),),
        adapter=(Sign(r"_knots_\d+_"),),
        version=r"knots",
        architecture=r"knots",
        pipelines=("Knots",),
        readers={"ComfyUI": Reader(KOHYA | GENERIC, NONE)},
        names=NAMES,
        network_arguments=TARGETS.arguments,
        open_for_merging=open_base_model,
        view_for_networks=view_for_networks,
        adapter_metadata=RECIPE.of_checkpoint,
    ),
)
