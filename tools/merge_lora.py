"""Merge LoRA files into a checkpoint, or several LoRA files into one.

With --sd_model the changes are added to the weights of a checkpoint of any supported base model. A file in the original
layout results in a file, a diffusers folder of a model with a U-Net in a folder; all other tensors are copied. Without
--sd_model the files become one LoRA with the change sum(ratio * change): exactly with --concat (the ranks add up),
otherwise as the best approximation (SVD) at rank --new_rank, by default the largest rank of the files. LoRA,
convolutions, Tucker cores, LoHa, LoKr and norm weights can be merged in every mode. The change of OFT, BOFT and DoRA
depends on the base weight: merging them into a LoRA requires a rank and --base_model. With --concat, a LoHa of rank r
counts as rank r * r, and a LoKr as the product of the ranks of its matrices. The log reports the error of the merged
LoRA.
"""

import argparse
import logging
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

from torch import Tensor
from tqdm import tqdm

from library.base.command_parser import make_parser
from library.base.errors import UserError, about
from library.base.randomness import generator_for
from library.base.terminal import print_line
from library.checkpoints import model_lookup
from library.checkpoints.adapter_keys import is_of_text_encoder
from library.checkpoints.base_model import BaseModel, WeightFile
from library.checkpoints.folders import atomic_folder
from library.checkpoints.headers import read_metadata
from library.checkpoints.marks import mark_folder, mark_of
from library.checkpoints.metadata import EXPERT
from library.checkpoints.saving import save_safetensors, save_weights
from library.commands import block_weights
from library.commands import command as tool
from library.commands.adapter_files import names_in, read_adapter, spec_for_file, write_lora
from library.commands.base_models import open_base_model, spec_for
from networks.core.files.adapter_file import COMPUTED, AdapterFile, require_layouts
from networks.core.files.foreign_names import from_published
from networks.core.files.module_weights import ModuleWeights, make_name_error
from networks.core.files.renaming import rename
from networks.core.kinds import norm
from tools.merge_adapters import (
    Arithmetic,
    Joining,
    Weighted,
    find_path,
    largest_ranks,
    make_metadata,
    merge_adapters,
    modelspec,
)

logger = logging.getLogger(__name__)

WRITER = "tools/merge_lora.py"
EXAMPLES = """\
  python3 tools/merge_lora.py --sd_model sd15.safetensors --models cat.safetensors --ratios 0.8 \\
      --save_to sd15_cat.safetensors
  python3 tools/merge_lora.py --models cat.safetensors style.safetensors --ratios 1.0 0.5 --concat \\
      --save_to cat_in_style.safetensors
  python3 tools/merge_lora.py --models cat.safetensors style.safetensors --ratios 1.0 0.5 --new_rank 16 \\
      --save_to cat_in_style_16.safetensors
  python3 tools/merge_lora.py --models cat_oft.safetensors --base_model sd15.safetensors --new_rank 32 \\
      --save_to cat_32.safetensors"""


# --- into a checkpoint ---


def merge_into_checkpoint(
    base: BaseModel, adapters: Sequence[Weighted], save_to: Path, arithmetic: Arithmetic, with_metadata: bool
) -> None:
    """Write the checkpoint with the changes added, and print how many modules changed."""
    changes = collect_changes(base, adapters)
    metadata = checkpoint_metadata(base, adapters, save_to) if with_metadata else {}
    with tqdm(total=sum(len(file.weights.shapes) for file in base.files), desc="merging", unit="tensor") as progress:
        merge = CheckpointMerge(changes, arithmetic, progress)
        if base.is_folder:
            write_folder(base, merge, save_to)
        else:
            save_weights(save_to, merge.merge_tensors(base.files[0]), metadata, mark_of(WRITER, save_to))
    print_line(f"{save_to}: {len(adapters)} adapters merged into {len(changes)} modules")


def fit_names(file: AdapterFile, base: BaseModel) -> AdapterFile:
    """Return a file whose modules are layers of the checkpoint, or parts of them."""
    if base.names_in_file is not None:
        return rename(file, base.names_in_file(file.metadata, file.origin), "kohya").file
    if (converted := from_published(file, base.names.published)) is not file:
        return converted
    # In diffusers' naming, several modules can make up one of the base model, or its rows have another order.
    if any(module.pieces or module.swaps_pair for module in base.names.modules):
        return rename(file, base.names, "kohya", keeps_pieces=True).file
    if spec_for(base).is_general and not (spec := spec_for_file(file, file.origin)).is_general:
        return rename(file, spec.names, "diffusers").file
    return file


def collect_changes(base: BaseModel, adapters: Sequence[Weighted]) -> dict[str, list[tuple[ModuleWeights, float]]]:
    """Map each module, in kohya's naming, to its changes and their ratios, in the order of the files.

    Raises UserError for modules that the checkpoint lacks, because nothing is omitted silently.
    """
    base_modules = base.modules
    changes: dict[str, list[tuple[ModuleWeights, float]]] = {}
    for adapter in adapters:
        require_layouts(adapter.file, COMPUTED, "merged")
        modules, origin = adapter.file.modules, adapter.file.origin
        found = {name: names.kohya for name in modules if (names := base.names.find(name)) is not None}
        missing = [name for name in modules if found.get(name) not in base_modules]
        if missing:
            raise UserError(
                f"{origin}: {len(missing)} of its {len(modules)} modules are not in --sd_model {base.path}; "
                f"the first is {missing[0]}; {suggest_fix(base, missing, len(modules))}"
            )
        for kohya, number in Counter(found.values()).items():
            if number > 1:
                raise make_name_error(origin, kohya)
        for name, kohya in found.items():
            if not adapter.is_omitted(kohya):
                changes.setdefault(kohya, []).append((modules[name], adapter.ratio_of(kohya)))
    return changes


def suggest_fix(base: BaseModel, missing: Sequence[str], num_modules: int) -> str:
    """Return what to do about modules that a checkpoint lacks."""
    if spec_for(base).is_general and all(map(is_of_text_encoder, missing)):
        return "text encoders in a pipeline's folder are not merged; use a file with all parts of the model"
    are_known = [spec_for(base).names.find(name) is not None for name in missing]
    if not any(are_known) and 2 * len(missing) < num_modules:  # layers that other programs adapt too
        return "`tools/convert_lora.py --to kohya --drop_unsupported` writes it without the missing modules"
    if all(are_known) and all(map(is_of_text_encoder, missing)):
        return "they belong to a text encoder; use a checkpoint with all parts of the model"
    return "was it made for another base model?"


def require_one_expert(files: Sequence[AdapterFile]) -> None:
    """Raise UserError if files that become one were trained on different denoisers of a model."""
    first, *others = files
    if other := next((f for f in others if f.metadata.get(EXPERT) != first.metadata.get(EXPERT)), None):
        raise UserError(
            f"{first.origin} and {other.origin} were trained on different denoisers ({EXPERT} "
            f"{first.metadata.get(EXPERT, 'none')} and {other.metadata.get(EXPERT, 'none')}), so they cannot become "
            "one file",
            "merge both into the model with --sd_model",
        )


@dataclass(frozen=True)
class CheckpointMerge:
    """The changes by module, in kohya's naming, and the arithmetic that adds them."""

    changes: Mapping[str, Sequence[tuple[ModuleWeights, float]]]
    arithmetic: Arithmetic
    progress: "tqdm[None]"

    def merge_tensors(self, file: WeightFile) -> dict[str, Tensor]:
        """Return every tensor of one file, with the adapters added."""
        dtype, save_dtype = self.arithmetic.dtype, self.arithmetic.save_dtype
        modules = {stem: module for module, stem in file.stems.items()}
        tensors = {}
        for key in file.weights.shapes:
            old = file.weights.read(key)
            stem, _, parameter_key = key.rpartition(".")
            module_changes = self.changes.get(modules.get(stem, ""), ())
            new = old.to(self.arithmetic.device) if module_changes else self.merge_thirds(file, key, old)
            for module, ratio in module_changes:
                if module.changes(parameter_key):
                    new = module.merged(new, ratio, dtype, parameter_key)
            is_number = old.is_floating_point()
            tensors[key] = new.to("cpu", save_dtype if save_dtype is not None and is_number else old.dtype)
            self.progress.update()
        return tensors

    def merge_thirds(self, file: WeightFile, key: str, old: Tensor) -> Tensor:
        """Change the rows of modules that share a tensor (q, k, v); return the same tensor if none changes."""
        changed = [(m, third) for m, third in file.thirds.items() if third.key == key and m in self.changes]
        if not changed:
            return old
        new = old.to(self.arithmetic.device, copy=True)
        for name, third in changed:
            rows = third.of(new)
            for module, ratio in self.changes[name]:
                if module.layout is not norm.LAYOUT:
                    if module.changes("bias"):
                        raise UserError(
                            f"{module.origin}: {name} changes one of several biases stored as one", "remove it"
                        )
                    rows.copy_(module.merged(rows, ratio, self.arithmetic.dtype))
        return new


def write_folder(base: BaseModel, merge: CheckpointMerge, save_to: Path) -> None:
    """Write a copy of the diffusers folder with changed weights, atomically."""
    parts = {file.part: file for file in base.files}

    def replaced(folder: str, names: list[str]) -> list[str]:
        """Return the weight files, in every precision and format, that the merged ones replace."""
        is_part = Path(folder).parent == base.path and Path(folder).name in parts
        return [name for name in names if is_part and name != "config.json"]

    with atomic_folder(save_to) as folder:
        shutil.copytree(base.path, folder, ignore=replaced, dirs_exist_ok=True)
        for part, file in parts.items():
            name = model_lookup.weight_files(part)[0][0]
            save_safetensors(folder / part / name, merge.merge_tensors(file), {"format": "pt"})
        mark_folder(folder, mark_of(WRITER, save_to))


def checkpoint_metadata(base: BaseModel, adapters: Sequence[Weighted], save_to: Path) -> dict[str, str]:
    """Return the merged checkpoint's metadata, without old entries that no longer hold."""
    old = {} if base.is_folder else read_metadata(base.path)
    kept = {key: value for key, value in old.items() if "hash" not in key}
    return {
        **kept,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": old.get("modelspec.architecture", base.architecture),
        **modelspec(save_to, [base.path, *(find_path(adapter.file) for adapter in adapters)]),
    }


# --- the command ---


def setup_parser(new_rank: int | None = None) -> argparse.ArgumentParser:
    """Return the command's options; `new_rank` is the default of --new_rank."""
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("--sd_model", type=Path, help="checkpoint to merge into: a single file or a diffusers folder")
    parser.add_argument("--base_model", type=Path, help="checkpoint that OFT, BOFT or DoRA of --models was trained on")
    save_to = {"help": "the file or, for a folder, the folder to write"}
    ratios = {"help": "strength of each file; unset: 1 for all"}
    tool.add_options(parser, "save_to", "models", "ratios", "v2", save_to=save_to, ratios=ratios)
    parser.add_argument("--lbws", nargs="+", help=block_weights.help_text())
    parser.add_argument("--concat", action="store_true", help="without --sd_model: exact, the ranks add")
    parser.add_argument("--shuffle", action="store_true", help="with --concat: no file can be extracted again")
    rank = {"default": new_rank, "help": "without --sd_model; unset: the largest rank"}
    unset = {"help": "precision of the file; unset: that of each tensor in a checkpoint, --precision in a LoRA"}
    names = ("new_rank", "new_conv_rank", "precision", "save_precision", "device", "no_metadata")
    return tool.add_options(parser, *names, new_rank=rank, save_precision=unset)


def resolve_ranks(args: argparse.Namespace, adapters: Sequence[Weighted]) -> tuple[int, int] | None:
    """Return (rank, rank of larger convolutions) of the merged LoRA, or None if factors are concatenated.

    Raises UserError if --new_rank is required but not set.
    """
    if args.concat:
        return None
    modules = [module for adapter in adapters for module in adapter.file.modules.values()]
    largest = largest_ranks(adapters) or ((1, 1) if all(module.layout is norm.LAYOUT for module in modules) else None)
    if args.new_rank is None and largest is None:
        raise about("--new_rank")(
            "is required: --models have no rank for the merged LoRA (LoKr of two whole matrices, OFT and BOFT have "
            "none)",
            "try 32, and see the error in the log",
        )
    new_rank, new_conv_rank = (args.new_rank, args.new_rank) if args.new_rank or largest is None else largest
    return new_rank, args.new_conv_rank or new_conv_rank


def check(args: argparse.Namespace) -> list[float]:
    """Return the ratios. Raises UserError for options that exclude each other."""
    ratios = tool.resolve_ratios(args, 1.0)
    if args.sd_model is not None and args.concat:
        raise about("--concat", others=["--sd_model"])(
            "makes one LoRA of several and cannot be used with --sd_model", "remove one of them"
        )
    if args.shuffle and not args.concat:
        logger.warning("--shuffle has no effect without --concat")
    tool.check_at_least_one(args, "new_rank", "new_conv_rank")
    for name in ("base_model", "new_rank", "new_conv_rank"):
        if getattr(args, name) is not None and args.concat and name != "base_model":
            raise about(f"--{name}", cause="does not fit", others=["--concat"])(
                "and --concat exclude each other: with --concat the ranks add up"
            )
        if getattr(args, name) is not None and args.sd_model is not None:
            raise about(f"--{name}", others=["--sd_model"])(
                "is only for merging into one LoRA and cannot be used with --sd_model", "remove it"
            )
    if args.sd_model is not None and args.sd_model.is_dir():
        tool.check_output_folder("--save_to", args.save_to, WRITER)
    else:
        tool.check_output("--save_to", args.save_to, WRITER, [*args.models, args.sd_model, args.base_model])
    return ratios


def log_strengths(ratios: Sequence[float], squares: bool) -> None:
    """Log the strengths that ratios stand for with --concat, if they differ from the ratios or look unintended.

    In sd-scripts the ratios 1.41 and -1.41 give the difference of two files of equal rank.
    """
    strengths = Joining(squares=True).strengths(ratios, [1] * len(ratios))
    if squares:
        logger.info(
            "--ratios with --concat act as in sd-scripts: as %s if the ranks are equal; tools/merge_lora.py uses "
            "them unchanged",
            ", ".join(f"{strength:.2f}" for strength in strengths),
        )
    elif len(ratios) > 1 and all(isclose(abs(strength), 1, rel_tol=0.02) for strength in strengths):
        logger.warning(
            "--ratios: %.2f with --concat is %.2f times the change of a file. In sd-scripts, and in %s, it means the "
            "unscaled change; use 1 for that", abs(ratios[0]), abs(ratios[0]), "networks/merge_lora.py",
        )  # fmt: skip


def weigh_files(
    files: Sequence[AdapterFile], ratios: Sequence[float], lbws: Sequence[str] | None, base: BaseModel | None
) -> list[Weighted]:
    """Return the files with their strengths. Block lists are for `base`'s model, or for each file's if it is None."""
    lists = block_weights.parse_lists(lbws, len(files))
    unweighted = [Weighted(file, ratio) for file, ratio in zip(files, ratios, strict=True)]
    if not lists:
        return unweighted
    specs = [spec_for_file(file, file.origin) if base is None else spec_for(base) for file in files]
    strengths = map(block_weights.strength_by_block, files, specs, lists)
    return [replace(adapter, strength_of=strength) for adapter, strength in zip(unweighted, strengths, strict=True)]


def merge(args: argparse.Namespace, squares: bool = False) -> None:
    """Read, merge and write; `squares` gives the ratios sd-scripts' meaning if factors are concatenated.

    Programs that call this may leave out options. Raises UserError.
    """
    args = tool.complete_options(setup_parser(), args)
    ratios = check(args)
    arithmetic = Arithmetic.from_args(args)
    files = [read_adapter(path, "--models") for path in args.models]
    base = None if args.sd_model is None else open_base_model("--sd_model", args.sd_model)
    adapters = weigh_files(files, ratios, args.lbws, base)
    if base is not None:
        adapters = [replace(adapter, file=fit_names(adapter.file, base)) for adapter in adapters]
        merge_into_checkpoint(base, adapters, args.save_to, arithmetic, not args.no_metadata)
        return
    require_one_expert(files)
    trained_on = None if args.base_model is None else open_base_model("--base_model", args.base_model)
    if args.concat:
        log_strengths(ratios, squares)
    # A fixed seed would allow anyone to undo the shuffling.
    shuffling = generator_for(secrets.randbits(62), "--shuffle") if args.shuffle else None
    joining = Joining(squares and args.concat, shuffling)
    modules = merge_adapters(adapters, resolve_ranks(args, adapters), arithmetic, trained_on, joining)
    metadata = make_metadata(adapters, modules, args.save_to, not args.no_metadata)
    dtype = arithmetic.save_dtype or arithmetic.dtype
    write_lora(args.save_to, modules, metadata, WRITER, dtype, names_in(files))


main = tool.command(setup_parser, merge)

if __name__ == "__main__":
    sys.exit(main())
