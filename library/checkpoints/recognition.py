"""Recognition of an adapter file's base model by its keys and metadata."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from library.base.errors import of_file
from library.checkpoints.adapter_keys import (
    WIDE_LEAVES,
    AdapterKey,
    composed_shapes,
    is_of_text_encoder,
    lacks_model_prefix,
    replace_module,
    to_underscores,
)
from library.checkpoints.adapter_names import add_missing_prefixes
from library.checkpoints.base_model_spec import BaseModelSpec, bases_of_pipeline, recognise
from library.checkpoints.files import file_in_folder
from library.checkpoints.weights import open_weights

TEXT_ENCODER = r"(lora_te\d?|text_encoders?(_\d)?)_"


def recognise_adapter(
    specs: Sequence[BaseModelSpec], shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]
) -> BaseModelSpec | None:
    """Return the base model of an adapter file, or None if it cannot be recognised.

    `shapes` has every key of the file. The base model in the metadata is trusted unless another one has more of the
    modules. Without it, the strongest sign decides, and between equally strong ones the number of modules that a base
    model has.
    Base models share text encoders, so a file with only text encoder keys belongs to the base model in its
    metadata.
    """
    shapes = _add_models(specs, shapes)
    recorded = base_in_metadata(specs, metadata)
    modules = {key.module for key in map(AdapterKey.parse, shapes) if key is not None}

    def count_known(spec: BaseModelSpec) -> int:
        return sum(spec.names.find(module) is not None for module in modules)

    if recorded is not None:
        if all(re.match(TEXT_ENCODER, to_underscores(key)) for key in shapes):
            return recorded
        most = max(map(count_known, specs))
        # A pipeline without a spec of its own has no table of modules; those of others may have all of their names.
        pipeline = pipeline_in(metadata)
        is_unlike = most < len(modules) or (pipeline and not bases_of_pipeline(specs, pipeline))
        if is_unlike if recorded.is_general else count_known(recorded) == most > 0:
            return recorded
    products = composed_shapes(shapes)
    return recognise(
        # The first of equals is recognised, so the recorded base model goes first.
        sorted(specs, key=lambda spec: spec is not recorded),
        {_flat(key): tuple(shape) if _gives_width(key) else products.get(key, ()) for key, shape in shapes.items()},
        lambda spec: spec.adapter,
        count_known,
    )


def keys_of_text_encoders(path: Path) -> list[str]:
    """Return the text encoder keys of an adapter file or PEFT folder; only the header is read."""
    return [key for key in open_weights(file_in_folder(path, str(path))).shapes if is_of_text_encoder(key)]


def is_dora(path: Path) -> bool:
    """Return True for an adapter file or PEFT folder with DoRA's magnitudes; only the header is read."""
    keys = map(AdapterKey.parse, open_weights(file_in_folder(path, str(path))).shapes)
    return any(key is not None and key.leaf == "dora_scale" for key in keys)


def pipeline_in(metadata: Mapping[str, str]) -> str:
    """Return the class of the pipeline that an adapter file's metadata name; "" without one."""
    name = metadata.get("modelspec.architecture", "").partition("/")[0]
    return name if name.endswith("Pipeline") else ""


def base_in_metadata(specs: Sequence[BaseModelSpec], metadata: Mapping[str, str]) -> BaseModelSpec | None:
    """Return the base model named in an adapter file's metadata, or None if no known one is named."""
    version, architecture = (metadata.get(key, "") for key in ("ss_base_model_version", "modelspec.architecture"))
    by_version = next((spec for spec in specs if re.match(spec.version, version)), None)
    return by_version or next((spec for spec in specs if re.match(spec.architecture, architecture)), None)


def require_spec(
    specs: Sequence[BaseModelSpec], shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str], origin: str
) -> BaseModelSpec:
    """Return the base model of an adapter file. Raises UserError naming `origin` if it is not recognised."""
    spec = recognise_adapter(specs, shapes, metadata)
    if spec is None:
        known = ", ".join(spec.title for spec in specs if spec.adapter)
        raise of_file(origin)(f": its base model cannot be recognised from its keys; supported: {known}")
    return spec


def _add_models(specs: Sequence[BaseModelSpec], shapes: Mapping[str, Sequence[int]]) -> Mapping[str, Sequence[int]]:
    """Complete keys that lack a sub-model prefix where it can be inferred; other keys stay as they are."""
    parsed = {key: AdapterKey.parse(key) for key in shapes}
    unprefixed = {k.module for k in parsed.values() if k is not None and lacks_model_prefix(k.module)}
    prefixed = add_missing_prefixes(unprefixed, [spec.names for spec in specs]) if unprefixed else {}

    def complete(key: str) -> str:
        parsed_key = parsed[key]
        return (
            key
            if parsed_key is None
            else replace_module(
                prefixed.get(parsed_key.module, parsed_key.module), key, parsed_key.module, parsed_key.leaf
            )
        )

    return {complete(key): shape for key, shape in shapes.items()}


def _flat(key: str) -> str:
    """Convert a key to the form that signs are matched against; networks.oft has its own prefix for the same names."""
    return re.sub(r"^oft_unet_", "lora_unet_", to_underscores(key))


def _gives_width(key: str) -> bool:
    """Return True if the second dimension of a key's tensor is the module's input width."""
    parsed = AdapterKey.parse(key)
    return parsed is not None and parsed.leaf in WIDE_LEAVES
