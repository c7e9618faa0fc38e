"""Find the words that a LoRA changes most, by running every token through the text encoder with and without it.

A LoRA trained on a trigger word changes the features of that word more than those of others, so the list can reveal a
forgotten trigger. The LoRA must have a text encoder part and belong to a base model with a U-Net.
"""

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

import torch
from torch import Tensor, nn
from tqdm import tqdm

from library.architectures.specs import list_specs
from library.base.command_parser import make_parser
from library.base.errors import UserError, about
from library.base.terminal import print_line
from library.checkpoints.base_model_spec import BaseModelSpec
from library.commands.adapter_files import read_adapter
from library.commands.base_models import find_base
from library.commands.command import add_options, check_at_least_one, command, resolve_device
from library.models.clip.clip import clip_body
from library.protocols import Architecture
from networks.core.files.adapter_file import COMPUTED, AdapterFile, require_layouts
from networks.core.files.module_weights import ModuleWeights

ENCODERS = ("text_encoder.", "text_encoder_2.")  # prefixes of module names in diffusers' naming
BODY = "text_model."
EXAMPLES = """\
  python3 tools/interrogate_lora.py --sd_model sd15.safetensors --model cat.safetensors"""


def open_architecture(flag: str, name: str) -> tuple[BaseModelSpec, Architecture]:
    """Open the base model of a checkpoint, of which only the text encoders will be loaded. Raises UserError."""
    path, spec = find_base(flag, name, "unet", "text_encoder")
    if not spec.folders:
        known = ", ".join(other.title for other in list_specs() if other.folders)
        raise about(flag)(f"{name} is {spec.called} model; supported: {known}")
    values: dict[str, Any] = spec.options.defaults() | {"pretrained_model_name_or_path": str(path)}
    if spec.script_flag:
        values[spec.script_flag.removeprefix("--")] = True
    return spec, spec.build(spec.options.from_args(argparse.Namespace(**values)))


def split_by_encoder(spec: BaseModelSpec, file: AdapterFile, num_encoders: int) -> list[dict[str, ModuleWeights]]:
    """Return the file's modules by path, one mapping per text encoder. Raises UserError if there are none."""
    require_layouts(file, COMPUTED, "looked into")
    modules_by_encoder: list[dict[str, ModuleWeights]] = [{} for _ in range(num_encoders)]
    for name, module in file.modules.items():
        names = spec.names.find(name)
        for prefix, modules in zip(ENCODERS, modules_by_encoder, strict=False):
            if names is not None and isinstance(names.diffusers, str) and names.diffusers.startswith(prefix):
                modules[names.diffusers.removeprefix(prefix).removeprefix(BODY)] = module
    if not any(modules_by_encoder):
        raise UserError(
            f"{file.origin} changes no text encoder of {spec.title}, so it changes no words: it was trained with "
            "--network_train_unet_only, or for another base model"
        )
    return modules_by_encoder


def merge_adapter(encoder: nn.Module, modules: dict[str, ModuleWeights]) -> nn.Module:
    """Return a copy of a text encoder with the adapter merged."""
    merged = copy.deepcopy(encoder)
    body = clip_body(merged)
    for path, module in modules.items():
        layer = body.get_submodule(path)
        for key in ("weight", "bias"):
            if module.changes(key):
                parameter = getattr(layer, key)
                parameter.data = module.merged(parameter.data, 1.0, torch.float32, key)
    return merged


def compute_states(encoder: nn.Module, ids_BT: Tensor, clip_skip: int) -> Tensor:
    """Return the states (B, T, W) of layer `clip_skip`, counted from the end, after the final norm."""
    states: Sequence[Tensor] = encoder(ids_BT, output_hidden_states=True).hidden_states
    normed: Tensor = clip_body(encoder).final_layer_norm(states[-clip_skip])
    return normed


def iterate_batches(tokenizer: Any, batch_size: int) -> Iterator[Tensor]:
    """Yield token IDs (B, 3): begin, one token, end; over the whole vocabulary in order."""
    # The special tokens end the vocabulary of CLIP.
    for first in range(0, max(tokenizer.all_special_ids) + 1, batch_size):
        ids = range(first, min(first + batch_size, max(tokenizer.all_special_ids) + 1))
        yield torch.tensor([[tokenizer.bos_token_id, token, tokenizer.eos_token_id] for token in ids])


@torch.no_grad()
def measure_changes(
    encoder: nn.Module, modules: dict[str, ModuleWeights], tokenizer: Any, batch_size: int, clip_skip: int,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Return the change of each token's features: mean absolute difference over positions and channels.

    Raises UserError if the text encoder has fewer layers than `clip_skip`.
    """
    num_layers = len(clip_body(encoder).encoder.layers)
    if not 1 <= clip_skip <= num_layers:
        raise about("--clip_skip")(
            f"is {clip_skip}, but the text encoder has {num_layers} layers", f"use 1 to {num_layers}"
        )
    plain, changed = encoder.to(device), merge_adapter(encoder, modules).to(device)
    batches = list(iterate_batches(tokenizer, batch_size))
    changes = []
    for ids_BT in tqdm(batches, desc="words", unit="batch"):
        states = [compute_states(model, ids_BT.to(device), clip_skip) for model in (plain, changed)]
        changes.append((states[1] - states[0]).abs().mean(dim=(1, 2)).float().cpu())
    return torch.cat(changes)


def interrogate(args: argparse.Namespace) -> None:
    """Compare every word and print those that change most."""
    device = resolve_device(args.device)
    check_at_least_one(args, "batch_size", "top")
    file = read_adapter(args.model, "--model")
    spec, arch = open_architecture("--sd_model", args.sd_model)
    encoders, tokenizer = arch.load.text_encoders(), arch.text.tokenizer  # type: ignore[attr-defined]
    parts = [pair for pair in zip(encoders, split_by_encoder(spec, file, len(encoders)), strict=True) if pair[1]]
    clip_skip = args.clip_skip or 1
    sums_N = sum(measure_changes(*pair, tokenizer, args.batch_size, clip_skip, device) for pair in parts)
    assert isinstance(sums_N, Tensor)
    means_N = sums_N / len(parts)
    for position, token in enumerate(means_N.argsort(descending=True)[: args.top].tolist()):
        word = tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens([token]))
        print_line(f"[{position:3d}]: {token:5d} {word:<20s}: {means_N[token]:.5f}")


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("--sd_model", required=True, help="checkpoint that the LoRA is for: a file or diffusers folder")
    parser.add_argument("--batch_size", type=int, default=16, help="words at a time (default: 16)")
    parser.add_argument("--clip_skip", type=int, help="layer to compare, counted from the end; unset: the last")
    parser.add_argument("--top", type=int, default=100, help="how many words to show (default: 100)")
    add_options(parser, "model", "v2", "device")
    return parser


main = command(setup_parser, interrogate)

if __name__ == "__main__":
    sys.exit(main())
