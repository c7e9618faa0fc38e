"""Extract a LoRA from the difference between two checkpoints of one base model.

Every layer that networks.lora targets gets the best approximation of its difference at rank --dim; with --conv_dim also
the larger convolutions. Text encoders of a model with a U-Net are omitted if none of their layers differs by more than
--min_diff. For other models only the transformer is compared, which must be a file in the original layout. Biases, norm
weights and layers that LoRA does not target are omitted.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

import torch
from torch import Tensor
from tqdm import tqdm

from library.base.command_parser import make_parser
from library.base.errors import about
from library.checkpoints.base_model import BaseModel
from library.commands import command as tool
from library.commands.adapter_files import write_lora
from library.commands.base_models import find_adapter_targets, open_base_model, spec_for
from library.memory.devices import SAVE_DTYPES
from networks.core.files.module_weights import ModuleWeights
from networks.core.targets.targets import TargetModule
from tools.merge_adapters import approximate_change, modelspec, rank_metadata, sum_errors

logger = logging.getLogger(__name__)

WRITER = "tools/extract_lora_from_models.py"
EXAMPLES = """\
  python3 tools/extract_lora_from_models.py --model_org sd15.safetensors --model_tuned tuned.safetensors \\
      --save_to tuned_lora.safetensors --dim 32
  python3 tools/extract_lora_from_models.py --model_org sd15.safetensors --model_tuned tuned.safetensors \\
      --save_to tuned_locon.safetensors --dim 32 --conv_dim 16 --save_precision fp16"""


def subtract_weights(org: BaseModel, tuned: BaseModel, name: str) -> Tensor:
    """Return the difference of a weight, in float64. Raises UserError naming a checkpoint with NaN or infinity."""
    weights = [base.read(name).double() for base in (org, tuned)]
    for flag, base, weight in zip(("--model_org", "--model_tuned"), (org, tuned), weights, strict=True):
        # NaN exceeds no --min_diff, so a damaged text encoder would count as unchanged.
        if num_bad := int((~torch.isfinite(weight)).sum()):
            raise about(flag, base.path, cause="unreadable")(
                f": {name} has {num_bad} of {weight.numel()} values that are not finite; the checkpoint is damaged",
                "use another one",
            )
    return weights[1] - weights[0]


def measure_differences(org: BaseModel, tuned: BaseModel, target_modules: Sequence[TargetModule]) -> dict[str, float]:
    """Return the largest absolute difference of a weight in each layer, by module name."""
    return {
        target.name: float(subtract_weights(org, tuned, target.name).abs().max())
        for target in tqdm(target_modules, desc="comparing text encoders", unit="layer")
    }


def extract_modules(
    org: BaseModel, tuned: BaseModel, args: argparse.Namespace, device: torch.device
) -> list[ModuleWeights]:
    """Return the modules of the LoRA. Raises UserError if the checkpoints have different layers or are equal."""
    encoder_targets, unet_targets = find_adapter_targets(org, with_convolutions=args.conv_dim is not None)
    check_same_layers(org, tuned, [*encoder_targets, *unet_targets])
    if max(measure_differences(org, tuned, encoder_targets).values(), default=0.0) <= args.min_diff:
        logger.info("omitting the text encoders, which differ by no more than --min_diff %g", args.min_diff)
        encoder_targets = []
    extracted = []
    for target in tqdm([*encoder_targets, *unet_targets], desc="extracting", unit="layer"):
        rank = args.conv_dim if target.kind == "conv" else args.dim
        if rank is not None:
            change = subtract_weights(org, tuned, target.name)
            extracted.append(approximate_change(target.name, change, rank, device, torch.float32, args.clamp_quantile))
    missed, total = sum_errors(extracted)
    if total == 0:
        raise about("--model_tuned")("equals --model_org in every layer that a LoRA targets; nothing to extract")
    share = 100 * (missed / total) ** 0.5
    logger.info("%d layers; the LoRA misses %.1f%% of their difference (norm)", len(extracted), share)
    return [result.module for result in extracted]


def check_same_layers(org: BaseModel, tuned: BaseModel, target_modules: Sequence[TargetModule]) -> None:
    """Raise UserError unless both checkpoints have every layer, with the same shape."""
    for target in target_modules:
        a, b = (read_shape(base, target.name) for base in (org, tuned))
        if a != b:
            raise about("--model_tuned", tuned.path)(
                f"is not a tuned --model_org {org.path}: {target.name} has shape {b or 'none'} instead of {a or 'none'}"
            )


def read_shape(base: BaseModel, module: str) -> tuple[int, ...] | None:
    """Return the shape of a module's weight, None if there is none; a 1x1 convolution counts as a matrix."""
    shape = base.shape(module)
    # One checkpoint may store a projection as a 1x1 convolution, the other as a matrix.
    return shape[:2] if shape is not None and set(shape[2:]) == {1} else shape


def make_metadata(args: argparse.Namespace, base: BaseModel) -> dict[str, str]:
    metadata = {
        **spec_for(base).adapter_metadata(base.architecture, args.v_parameterization),
        "ss_network_module": "networks.lora",
        **rank_metadata(args.dim, args.conv_dim),
    }
    if args.no_metadata:
        return {key: value for key, value in metadata.items() if key.startswith("ss_")}
    return {**metadata, "modelspec.sai_model_spec": "1.0.1", **modelspec(args.save_to)}


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    for model, word in (("org", "original"), ("tuned", "tuned")):
        title = f"the {word} checkpoint: file or diffusers folder"
        parser.add_argument(f"--model_{model}", type=Path, required=True, help=title)
        parser.add_argument(f"--load_{word}_model_to", help="has no effect: weights are read one by one")
    parser.add_argument("--dim", type=int, default=4, help="rank of Linear layers and 1x1 convolutions (default: 4)")
    parser.add_argument("--conv_dim", type=int, help="rank of larger kernels; unset: they are omitted")
    parser.add_argument(
        "--clamp_quantile",
        type=float,
        default=1.0,
        help="clamp the factors to this quantile, 0.99 in sd-scripts; costs accuracy (default: 1, off)",
    )
    parser.add_argument("--min_diff", type=float, default=0.01, help="least change of a text encoder (default: 0.01)")
    for flag, title in (("v2", "SD 2.x"), ("sdxl", "SDXL")):
        parser.add_argument(f"--{flag}", action="store_true", help=f"require {title}; the model is recognised anyway")
    parser.add_argument("--v_parameterization", action="store_true", help="record that the model predicts velocity")
    parser.add_argument("--load_precision", choices=tuple(SAVE_DTYPES), help="has no effect: weights stay as they are")
    parser.add_argument("--mem_eff_safe_open", action="store_true", help="has no effect: weights are read one by one")
    unset = {"help": "precision of the file; unset: float"}
    return tool.add_options(parser, "save_to", "save_precision", "device", "no_metadata", save_precision=unset)


def check(args: argparse.Namespace) -> None:
    """Raise UserError for invalid option values."""
    tool.check_at_least_one(args, "dim", "conv_dim")
    if not 0.5 < args.clamp_quantile <= 1:
        raise about("--clamp_quantile")(
            f"is {args.clamp_quantile:g}", "use a value above 0.5 and up to 1, which disables it"
        )
    tool.check_finite("--min_diff", args.min_diff)
    tool.check_output("--save_to", args.save_to, WRITER, [args.model_org, args.model_tuned])


def check_bases(args: argparse.Namespace, org: BaseModel, tuned: BaseModel) -> None:
    """Raise UserError unless both checkpoints have the same base model, and it is the required one."""
    org_spec, tuned_spec = spec_for(org), spec_for(tuned)
    if org_spec.name != tuned_spec.name:
        raise about("--model_org")(
            f"is {org_spec.called} model, --model_tuned {tuned_spec.called} model", "use two of one kind"
        )
    for flag, base in (("v2", "sd2"), ("sdxl", "sdxl")):
        if getattr(args, flag) and org_spec.name != base:
            raise about(f"--{flag}")(f": --model_org {org.path} is of {org_spec.title}", f"remove --{flag}")


def extract(args: argparse.Namespace) -> None:
    """Read both checkpoints and write their difference as a LoRA."""
    check(args)
    if args.load_precision is not None:
        logger.warning("--load_precision has no effect: weights are compared in the precision they have")
    device = tool.resolve_device(args.device)
    org = open_base_model("--model_org", args.model_org)
    tuned = open_base_model("--model_tuned", args.model_tuned)
    check_bases(args, org, tuned)
    modules = extract_modules(org, tuned, args, device)
    dtype = tool.parse_dtype(args.save_precision)
    write_lora(args.save_to, modules, make_metadata(args, org), WRITER, dtype, org.names, spec_for(org))


main = tool.command(setup_parser, extract)

if __name__ == "__main__":
    sys.exit(main())
