"""Checkpoints with weights in 8 or 4 bits, in the two formats that ComfyUI and its users write.

The older format has a `scaled_fp8` marker, and `<layer>.scale_weight` next to 8-bit weights. The newer one has
`<layer>.weight_scale`, and describes each layer's storage in `<layer>.comfy_quant` (JSON as bytes) or in
`_quantization_metadata` in the header. Names and layouts follow comfy-kitchen, and the tests compare with its results.

Letters: O outputs, I inputs, G groups of inputs.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.base.errors import list_few, of_file
from library.base.json_text import parse_json
from library.checkpoints.weights import FromFiles, Quantised, Weights, open_weights

MARK = "scaled_fp8"
SCALES = (".scale_weight", ".weight_scale")
DROPPED = (MARK, ".scale_input", ".input_scale", ".comfy_quant", ".weight_scale_2", *SCALES)
# The values of the lower three bits of a 4-bit number (E2M1); the highest bit is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NVFP4_GROUP, MXFP8_GROUP = 16, 32  # inputs that share a scale
E8M0_BIAS = 127  # of scales that have only an exponent
TILE_ROWS, TILE_COLUMNS = 128, 4  # of scales in tensor core order
MODEL_PREFIX = re.compile(
    r"model\.diffusion_model\.|cond_stage_model\.|first_stage_model\.|vae\.|(?:text_encoders|conditioner\.embedders)\.\w+\."
)
PADDED_TO = {"nvfp4": 16, "mxfp8": 32}  # both sides of a matrix are padded to a multiple of this
HALVED = ("nvfp4",)  # formats with two values per byte

Config = Mapping[str, Any]
"""The description of one layer: `format`, and for rotated layers `convrot` and `convrot_groupsize`."""
DEFAULT_CONVROT_GROUP = 256  # comfy-kitchen's
LARGEST_CONVROT_GROUP = 4**6  # the next one's matrix takes 2 GiB


def open_checkpoint(path: Path) -> Weights:
    """Open a weight file, or the index of several, with weights of any supported format decoded.

    Raises UserError as `open_weights` and `with_quantised` do.
    """
    return with_quantised(open_weights(path))


def with_quantised(weights: Weights) -> Weights:
    """Return the checkpoint with decoded weights: `read` decodes, `quantised` has the codes, scales and markers are
    hidden.

    A checkpoint without quantised weights is returned unchanged. Raises UserError naming the file and the layer for an
    unknown format and for missing or invalid scales.
    """
    scales = {
        key.removesuffix(suffix): key for suffix in SCALES for key in weights.shapes if key.endswith(suffix)
    }  # by layer; the newer name wins
    configs = layer_configs(weights)
    if not configs and not any(key.endswith(DROPPED) for key in weights.shapes):
        return weights
    shapes = {key: shape for key, shape in weights.shapes.items() if not key.endswith(DROPPED)}
    layers = {f"{layer}.weight": layer for layer in scales if f"{layer}.weight" in shapes}
    formats = {name: configs.get(layer, {}).get("format", "") for name, layer in layers.items()}
    check_formats(weights, formats)
    check_scales(weights, scales, configs)
    for name, layer in layers.items():
        check_layout(weights, layer, scales[layer], configs.get(layer, {}))
        if formats[name] in HALVED:
            rows, columns = shapes[name]
            shapes[name] = (rows, 2 * columns)

    def read(name: str) -> Tensor:
        layer = layers.get(name)
        if layer is None:
            return weights.read(name)
        return DECODERS[formats[name]](weights, layer, scales[layer], configs.get(layer, {}))

    quantised = {}
    for name, layer in layers.items():
        config = configs.get(layer, {})
        kind = keepable_format(config, formats[name], shapes[name])
        if kind is not None:
            size = rotation_size(config) if config.get("convrot") else None
            quantised[name] = Quantised(kind, size, codes_reader(weights, layer, scales[layer]))
    padded_to = {name: PADDED_TO[kind] for name, kind in formats.items() if kind in PADDED_TO}
    return replace(weights, shapes=shapes, read=read, quantised=quantised, padded_to=padded_to)


def check_formats(weights: Weights, formats: Mapping[str, object]) -> None:
    """Raise UserError for a weight in a format that is not supported."""
    for name, kind in formats.items():
        if not isinstance(kind, str) or kind not in DECODERS:
            raise of_file(weights.origin)(
                f": {name} is stored in the unsupported format {str(kind)[:40]!r}; supported: "
                f"{', '.join(sorted(filter(None, DECODERS)))}. Use a bf16 or fp8 file of this model"
            )


def check_scales(weights: Weights, scales: Mapping[str, str], configs: Mapping[str, Config]) -> None:
    """Raise UserError naming the layers with missing, negative or non-finite scales, or scales of 0 for codes that
    are not 0."""
    if not scales:
        check_marked(weights)
    # A file may contain plain fp8 weights if only another model in it, or only its matrices, are scaled.
    scaled_kinds = {(model_in_file(key), 2) for key in weights.shapes if key.endswith(MARK)}
    scaled_kinds |= {
        (model_in_file(scale), len(weights.shapes.get(f"{layer}.weight", ()))) for layer, scale in scales.items()
    }
    missing, impossible = [], []
    for name, shape in weights.shapes.items():
        layer, _, last = name.rpartition(".")
        if last != "weight":
            continue
        if layer not in scales:
            if layer in configs or ((model_in_file(name), len(shape)) in scaled_kinds and is_plain_fp8(weights, name)):
                missing.append(layer)
        elif configs.get(layer, {}).get("format") == "nvfp4":
            global_key = f"{layer}.weight_scale_2"
            if global_key not in weights.shapes:
                missing.append(layer)
            elif prod(weights.shapes[global_key]) != 1 or not 0 < float(weights.read(global_key)) < torch.inf:
                impossible.append(layer)
        # The scales of mxfp8 have only an exponent, so none of them is negative or 0.
        elif configs.get(layer, {}).get("format") != "mxfp8" and not are_possible(weights, layer, scales[layer]):
            impossible.append(layer)
    for layers, problem in ((missing, "have no scale"), (impossible, "have scales that are negative, not finite or 0")):
        if layers:
            raise of_file(weights.origin)(
                f": these quantised layers {problem} and cannot be decoded: {list_few(layers)}. "
                "Download the file again, or use a bf16 file of this model"
            )


def check_marked(weights: Weights) -> None:
    """Raise UserError for fp8 weights of a model that is marked as scaled, in a file without any scale."""
    marked = {model_in_file(key) for key in weights.shapes if key.endswith(MARK)}
    names = [
        name
        for name in weights.shapes
        if not name.endswith(MARK)  # the marker itself may be fp8
        and ("" in marked or model_in_file(name) in marked)
        and is_plain_fp8(weights, name)
    ]
    if names:
        raise of_file(weights.origin)(
            f"is marked as {MARK}, but has no scales for its fp8 weights: {list_few(names)}. "
            "Download the file again, or use a bf16 file of this model"
        )


def check_layout(weights: Weights, layer: str, scale: str, config: Config) -> None:
    """Raise UserError naming a layer if its codes, scales and rotation do not match."""
    name, kind = f"{layer}.weight", config.get("format", "")
    shape, num_scales = weights.shapes[name], prod(weights.shapes[scale])
    if kind in PADDED_TO:
        are_bytes = (dtype_in_file(weights, key).itemsize == 1 for key in (name, scale))
        fits = is_tiled(kind, shape, num_scales) and all(are_bytes)
    else:
        num_groups, remainder = divmod(num_scales, shape[0] if shape else 1)
        is_grouped = not remainder and num_groups > 1 and len(shape) == 2 and shape[1] % num_groups == 0
        fits = num_scales == 1 or (num_groups == 1 and not remainder) or is_grouped
    if not fits:
        raise of_file(weights.origin, cause="does not fit")(
            f": {layer} has {num_scales} scales for a weight of shape {list(shape)} stored as "
            f"{kind or 'fp8'}, which do not fit each other. Download the file again, or use a bf16 file of this model"
        )
    if not config.get("convrot"):
        return
    size = config.get("convrot_groupsize") or DEFAULT_CONVROT_GROUP
    is_power_of_4 = type(size) is int and size in (4**power for power in range(1, 7))
    if not is_power_of_4 or len(shape) != 2 or shape[1] % size:
        raise of_file(weights.origin)(
            f": {layer} has the convrot_groupsize {str(size)[:40]!r}; it must be a power of 4, at most "
            f"{LARGEST_CONVROT_GROUP}, that divides the weight's {shape[-1] if shape else 0} inputs. Use a bf16 file "
            "of this model"
        )


def is_tiled(kind: str, shape: tuple[int, ...], num_scales: int) -> bool:
    """Return True if the number of scales fits the tiled layout of an nvfp4 or mxfp8 matrix."""
    if len(shape) != 2 or 0 in shape:
        return False
    num_inputs, group = (2 * shape[1], NVFP4_GROUP) if kind in HALVED else (shape[1], MXFP8_GROUP)
    num_tiles = -(-shape[0] // TILE_ROWS) * -(-num_inputs // (group * TILE_COLUMNS))
    return num_inputs % group == 0 and num_scales == num_tiles * TILE_ROWS * TILE_COLUMNS


def model_in_file(key: str) -> str:
    """Return the prefix of a sub-model in a file that contains several; "" if the key has none."""
    match = MODEL_PREFIX.match(key)
    return match[0] if match else ""


def is_plain_fp8(weights: Weights, name: str) -> bool:
    """Return True if a tensor is stored in 8-bit floating point."""
    dtype = dtype_in_file(weights, name)
    return dtype.is_floating_point and dtype.itemsize == 1


def dtype_in_file(weights: Weights, name: str) -> torch.dtype:
    """Return a tensor's stored dtype, from the header if the file has one."""
    places = weights.read.places if isinstance(weights.read, FromFiles) else {}
    return places[name].dtype if name in places else weights.read(name).dtype


def are_possible(weights: Weights, layer: str, scale: str) -> bool:
    """Return True if all scales are finite and positive; a scale may be 0 if all of its codes are."""
    scales = weights.read(scale).float()
    if not scales.isfinite().all() or (scales < 0).any():
        return False
    if (scales > 0).all():
        return True
    codes = weights.read(f"{layer}.weight").float()
    return not multiply_scales(codes, reshape_scales((scales == 0).float(), len(codes))).any()


def layer_configs(weights: Weights) -> dict[str, Config]:
    """Return the file's layer descriptions by layer name. Raises UserError for invalid JSON."""
    configs: dict[str, Config] = {}
    try:
        header = parse_json(weights.metadata.get("_quantization_metadata", "{}"))
        layers = header.get("layers") if isinstance(header, dict) else None
        layers = layers if isinstance(layers, dict) else {}
        for key in weights.shapes:
            layer, dot, last = key.rpartition(".")
            if last == "comfy_quant":
                configs[layer] = parse_json(weights.read(key).to(torch.uint8).numpy().tobytes())
            elif dot and last == "weight" and (header_config := find_config(layers, layer)) is not None:
                configs.setdefault(layer, header_config)
    except ValueError as error:
        raise of_file(weights.origin)(f": the JSON description of its weights is invalid: {error}") from error
    return {layer: flat(config) for layer, config in configs.items() if isinstance(config, dict)}


def find_config(layers: Mapping[str, Config], layer: str) -> Config | None:
    """Return the header's description of a layer; its name there may lack the tensors' prefix."""
    while layer not in layers:
        _, dot, layer = layer.partition(".")
        if not dot:
            return None
    return layers[layer]


def flat(config: Config) -> Config:
    """Merge a description's `params` into its top level."""
    params = config.get("params")
    return {**config, **(params if isinstance(params, dict) else {})}


def keepable_format(config: Config, stored_as: str, shape: tuple[int, ...]) -> str | None:
    """Return the --base_format with the same codes, or None if the weight must be decoded."""
    if len(shape) != 2:
        return None
    if stored_as == "int8_tensorwise":
        return "int8_rotated" if config.get("convrot") else "int8"
    return "fp8" if stored_as in ("", "float8_e4m3fn", "float8_e5m2") else None


def rotation_size(config: Config) -> int:
    """Return the number of inputs that share a rotation."""
    return int(config.get("convrot_groupsize") or DEFAULT_CONVROT_GROUP)


def codes_reader(weights: Weights, layer: str, scale: str) -> Callable[[], Mapping[str, Tensor] | None]:
    """Return a function that reads codes (O, I) and scales (), (O, 1) or (O, G, 1); it returns None if the weight is
    not 8-bit."""

    def read() -> Mapping[str, Tensor] | None:
        codes = weights.read(f"{layer}.weight")
        if codes.element_size() != 1:
            return None
        return {"codes": codes, "scales": reshape_scales(weights.read(scale), len(codes))}

    return read


def reshape_scales(scales: Tensor, num_rows: int) -> Tensor:
    """Reshape scales to (), (O, 1) or (O, G, 1), in float32."""
    if scales.numel() == 1:
        return scales.float().reshape(())
    return scales.float().reshape(num_rows, -1, 1) if scales.numel() > num_rows else scales.float().reshape(num_rows, 1)


def apply_scales(weights: Weights, layer: str, scale: str, config: Config) -> Tensor:
    """Return codes * scales, with any rotation undone."""
    codes, scales = weights.read(f"{layer}.weight").float(), weights.read(scale)
    values = multiply_scales(codes, reshape_scales(scales, len(codes)))
    return rotate_groups(values, rotation_size(config)) if config.get("convrot") else values


def multiply_scales(codes: Tensor, scales: Tensor) -> Tensor:
    """Multiply codes by scales per tensor, per row, or per group within a row."""
    if scales.ndim < 3:
        return codes * (scales if scales.ndim == 0 else scales.to(codes.dtype).reshape(-1, *[1] * (codes.ndim - 1)))
    grouped = codes.reshape(len(codes), scales.shape[1], -1) * scales.to(codes.dtype)
    return grouped.reshape(codes.shape)


def rotate_groups(weight_OI: Tensor, group_size: int) -> Tensor:
    """Multiply each group of inputs by ConvRot's regular Hadamard matrix, which is its own inverse."""
    matrix = regular_hadamard(group_size).to(weight_OI.device, weight_OI.dtype)
    rotated: Tensor = weight_OI.reshape(-1, group_size) @ matrix
    return rotated.reshape(weight_OI.shape)


def regular_hadamard(size: int) -> Tensor:
    """Return the regular Hadamard matrix of `size`, a power of 4, in float64: symmetric and orthogonal.

    It is the normalised Kronecker power of the 4 x 4 matrix with row sums of 2.
    """
    hadamard_4 = 1 - 2 * torch.eye(4, dtype=torch.float64).flip(1)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(matrix, hadamard_4) / 2
    return matrix


def nvfp4(weights: Weights, layer: str, scale: str, config: Config) -> Tensor:
    """Decode nvfp4: 4-bit numbers (the first of each byte in its high bits), an fp8 scale per 16 inputs, and one
    global scale."""
    bytes_OH = weights.read(f"{layer}.weight").view(torch.uint8)
    codes_OI = torch.stack([bytes_OH >> 4, bytes_OH & 15], dim=-1).flatten(1).long()
    table = torch.tensor([*E2M1, *(-number for number in E2M1)])
    global_scale = weights.read(f"{layer}.weight_scale_2").float().reshape(())
    tiled = weights.read(scale).view(torch.float8_e4m3fn).float()
    scales_OG = untile_scales(tiled, len(codes_OI), codes_OI.shape[1] // NVFP4_GROUP)
    return multiply_scales(table[codes_OI], (global_scale * scales_OG)[..., None])


def mxfp8(weights: Weights, layer: str, scale: str, config: Config) -> Tensor:
    """Decode mxfp8: 8-bit numbers with a power-of-two scale per 32 inputs."""
    codes_OI = weights.read(f"{layer}.weight").float()
    exponents = untile_scales(weights.read(scale).view(torch.uint8), len(codes_OI), codes_OI.shape[1] // MXFP8_GROUP)
    return multiply_scales(codes_OI, torch.exp2(exponents.float() - E8M0_BIAS)[..., None])


def untile_scales(scales: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Return scales (O, G) in row order from tensor core order (cuBLAS, "block scaling factors layout").

    Tiles of 128 rows and 4 columns follow each other along the rows. Within a tile, the four groups of 32 rows are
    interleaved. The padding of the last tiles is cut.
    """
    across, down = -(-num_columns // TILE_COLUMNS), -(-num_rows // TILE_ROWS)
    tiles = scales.reshape(down, across, 32, 4, TILE_COLUMNS).transpose(2, 3)
    rows = tiles.reshape(down, across, TILE_ROWS, TILE_COLUMNS).permute(0, 2, 1, 3)
    return rows.reshape(down * TILE_ROWS, across * TILE_COLUMNS)[:num_rows, :num_columns]


DECODERS: Mapping[str, Callable[[Weights, str, str, Config], Tensor]] = {
    "": apply_scales,  # the older format, and files without a description
    "float8_e4m3fn": apply_scales,
    "float8_e5m2": apply_scales,
    "int8_tensorwise": apply_scales,
    "nvfp4": nvfp4,
    "mxfp8": mxfp8,
}
