"""Compatibility of an adapter file with inference programs, judged by its keys and shapes alone.

The rules were found by running each program's own loading code on files of every form: ComfyUI 0.29, diffusers 0.42,
Forge and stable-diffusion.cpp in 2026. "A1111-style" means loaders like that of AUTOMATIC1111's web UI.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal

from library.checkpoints.adapter_keys import AdapterKey, is_of_text_encoder, lacks_model_prefix, to_underscores
from library.checkpoints.adapter_names import NAMINGS, FileNaming
from library.checkpoints.base_model_spec import PROGRAMS, BaseModelSpec, Program, Reader
from library.checkpoints.recognition import recognise_adapter

Part = Literal["denoiser", "text"]
Amount = Literal["all", "some", "none"]

# Beyond this number Forge drops the whole file (measured with dfdcbab).
FORGE_MAX_UNKNOWN_KEYS = 12
MOST_REASONS = 4  # of a program, in messages


@dataclass(frozen=True)
class Key:
    """One key of an adapter file."""

    text: str
    module: str  # without the leaf, with underscores for dots
    leaf: str
    shape: tuple[int, ...]
    naming: FileNaming | None  # None if no program uses it
    part: Part


@dataclass(frozen=True)
class Reading:
    """One program's use of an adapter file."""

    program: Program
    num_keys: int
    unused: tuple[str, ...]  # keys without effect in the program
    inexact: tuple[str, ...]  # keys that act differently in the program than in training
    reasons: tuple[str, ...]  # one sentence each

    @property
    def num_used(self) -> int:
        """The number of keys that act as in training."""
        return self.num_keys - len(self.unused) - len(self.inexact)

    @property
    def amount(self) -> Amount:
        """How much of the file acts as in training."""
        if self.num_used == self.num_keys:
            return "all"
        return "some" if self.num_used else "none"


# --- kinds of weights by program ---

LOW_RANK = frozenset(("lora_down.weight", "lora_up.weight", "lora_A.weight", "lora_B.weight", "alpha"))
NORM = frozenset(("w_norm", "b_norm"))
OFT = frozenset(("oft_blocks", "rescale"))
GLORA = frozenset(f"{side}{n}.weight" for side in "ab" for n in (1, 2))
FULL = frozenset(("diff", "diff_b"))  # full changes of weights and biases
LOKR_CORE = "lokr_t2"
OFT_PREFIX = "oft_unet_"  # of names in files written by networks.oft
READ = re.compile(  # endings that programs read
    r"lora_(?:down|up|mid|A|B)\.weight|alpha|dora_scale|w_norm|b_norm|hada_(?:w[12]_[ab]|t[12])"
    r"|lokr_(?:w[12](?:_[ab])?|t2)|oft_blocks|rescale|[ab][12]\.weight|diff(?:_b)?|lora_magnitude_vector(?:\.weight)?"
)
PEFT_MAGNITUDES = frozenset(("lora_magnitude_vector", "lora_magnitude_vector.weight"))  # of DoRA per output row
DIFFUSERS_LEAVES = LOW_RANK | PEFT_MAGNITUDES | {"dora_scale"}


def readings(
    specs: Sequence[BaseModelSpec],
    shapes: Mapping[str, Sequence[int]],
    metadata: Mapping[str, str],
    alphas: Mapping[str, float] = MappingProxyType({}),
) -> tuple[Reading, ...]:
    """Return how each program uses an adapter file with these keys; empty if its base model is not recognised.

    `alphas` has the known values of `alpha` keys. For OFT, alpha is a limit, and 0 means no limit.
    """
    spec = recognise_adapter(specs, shapes, metadata)
    if spec is None:
        return ()
    keys = tuple(parse(text, tuple(shape)) for text, shape in shapes.items())
    content = Content(spec, keys, frozenset(key.module for key in keys if alphas.get(key.text) == 0))
    return tuple(read_by(program, content) for program in PROGRAMS)


def parse(text: str, shape: tuple[int, ...]) -> Key:
    """Parse a key. A key with an unknown ending or prefix keeps its text as module and has no naming."""
    parsed = AdapterKey.parse(text)
    if parsed is None or READ.fullmatch(parsed.ending) is None:
        return Key(text, to_underscores(text), "", shape, None, name_part(text))
    naming = next((naming for naming in NAMINGS if naming == parsed.naming), None)
    if re.match(r"model\.diffusion_model\.", parsed.module) or (naming == "kohya" and "." in parsed.module):
        naming = None  # the naming of complete checkpoints
    if lacks_model_prefix(parsed.module):
        naming = None  # programs read some of these, but which ones depends on the base model
    return Key(text, to_underscores(parsed.module), parsed.ending, shape, naming, name_part(parsed.module))


def name_part(module: str) -> Part:
    return "text" if is_of_text_encoder(module) else "denoiser"


@dataclass(frozen=True)
class Content:
    """The content of an adapter file, as the rules need it."""

    spec: BaseModelSpec
    keys: tuple[Key, ...]
    without_limit: frozenset[str]  # modules with alpha 0

    @cached_property
    def leaves(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """Shapes by module and leaf."""
        shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        for key in self.keys:
            shapes.setdefault(key.module, {})[key.leaf] = key.shape
        return shapes

    @cached_property
    def unknown_modules(self) -> frozenset[str]:
        """Modules that the base model lacks, both as whole and as fused layers."""
        names = self.spec.names
        return frozenset(module for module in self.leaves if not (names.find(module) or names.find_parts(module)))

    @cached_property
    def examples(self) -> Mapping[str, str]:
        """The first key of the file with each ending."""
        return {key.text.rpartition(".")[2]: key.text for key in reversed(self.keys)}

    def is_lone(self, key: Key) -> bool:
        """Return True if a key belongs to a module that has only an alpha."""
        return self.leaves[key.module].keys() == {"alpha"}


def read_by(program: Program, content: Content) -> Reading:
    """Apply one program's rules to a file."""
    keys = content.keys
    reader = content.spec.readers.get(program)
    if reader is None:
        reason = f"it supports no adapters of {content.spec.title}"
        return Reading(program, len(keys), tuple(key.text for key in keys), (), (reason,))
    unused: dict[str, str] = {}
    for key in keys:
        reason_unused = explain_unused(program, content, key, reader)
        if reason_unused is not None:
            unused[key.text] = reason_unused
    refusal = explain_refused(program, content, reader, len(unused))
    if refusal is not None:
        return Reading(program, len(keys), tuple(key.text for key in keys), (), (refusal,))
    # These are added after the refusal, because Forge knows the keys and does not count them as unknown.
    unused |= {key.text: "alphas without weights change nothing" for key in keys if content.is_lone(key)}
    inexact = {
        key.text: reason_inexact
        for key in keys
        if key.text not in unused and (reason_inexact := explain_inexact(program, content, key)) is not None
    }
    reasons = tuple(dict.fromkeys([*unused.values(), *inexact.values()]))
    return Reading(program, len(keys), tuple(unused), tuple(inexact), reasons)


def explain_unused(program: Program, content: Content, key: Key, reader: Reader) -> str | None:
    """Return why a program ignores a key, or None if it uses it."""
    if key.naming is None:
        return f"it is not known to read keys such as {content.examples[key.text.rpartition('.')[2]]}"
    if key.naming not in (reader.denoiser if key.part == "denoiser" else reader.text):
        subject = "text encoder keys in " if key.part == "text" else "keys in "
        return f"it does not read {subject}the {key.naming} naming"
    if key.module.startswith(OFT_PREFIX) and program != "A1111-style":
        return f"it does not look for names that begin with {OFT_PREFIX}"
    if key.module in content.unknown_modules:
        return f"{content.spec.title} has no modules with some of the file's names"
    for gap in reader.gaps:
        if key.naming in gap.namings and re.fullmatch(gap.modules, key.module):
            return gap.reason
    return explain_unused_leaf(program, content, key)


def explain_unused_leaf(program: Program, content: Content, key: Key) -> str | None:
    """Return why a program ignores a key's kind of weight, or None if it uses it."""
    leaves = content.leaves[key.module].keys()
    if program == "stable-diffusion.cpp" and key.leaf in NORM | {"dora_scale"}:
        return "it supports neither norm weights nor DoRA: the rest acts as plain LoRA"
    if program in ("Forge", "stable-diffusion.cpp") and leaves & OFT:
        return "it does not support OFT"
    if program != "ComfyUI" and leaves & (GLORA | FULL):
        return "it is not known to read GLoRA or full weight changes"
    if program == "ComfyUI" and LOKR_CORE in leaves:
        return "it skips layers with a LoKr that has a Tucker core"
    if program == "ComfyUI" and key.leaf in NORM and key.part == "text":
        return "it does not read norms of text encoders"
    if program == "A1111-style" and key.leaf in NORM and not leaves >= NORM:
        return "it needs w_norm and b_norm of a module together"
    return explain_unused_magnitude(program, key)


def explain_unused_magnitude(program: Program, key: Key) -> str | None:
    """Return why a program ignores a magnitude of DoRA, or None if it uses the key."""
    if key.leaf in PEFT_MAGNITUDES and (program != "diffusers" or key.naming != "diffusers"):
        return "it does not read lora_magnitude_vector: the rest acts as plain LoRA"
    if key.leaf == "lora_magnitude_vector" and key.part == "text":
        return (
            "for text encoders it reads only lora_magnitude_vector.weight: the rest acts as DoRA with other magnitudes"
        )
    if program == "diffusers" and key.leaf == "dora_scale":
        return "it drops dora_scale: the rest acts as plain LoRA"
    return None


def explain_inexact(program: Program, content: Content, key: Key) -> str | None:
    """Return why a key acts differently in a program than in training, or None if it does not."""
    leaves = content.leaves[key.module]
    # Training divides by the norm of base + change, ComfyUI and Forge by that of the base alone. In measured files the
    # difference is 1 to 3 % of the change.
    if program in ("ComfyUI", "Forge", "A1111-style") and is_dora_per_output(leaves):
        if leaves["dora_scale"][:1] == (1,):
            return "it takes the magnitudes (DoRA) of a layer with one output for one per output"
        return "DoRA with one magnitude per output acts differently there than in training"
    has_limit = "alpha" in leaves and key.module not in content.without_limit
    if program == "ComfyUI" and leaves.keys() & OFT and (has_limit or "rescale" in leaves):
        return "it limits OFT rotations to alpha, not alpha times the outputs, and ignores rescale"
    # With the core's inputs and outputs swapped in our formula, the mean difference from its image falls from 0.41 to
    # 0.05.
    if program == "stable-diffusion.cpp" and leaves.keys() & {"lora_mid.weight", "hada_t1", "hada_t2"}:
        return "it multiplies Tucker cores the wrong way round"
    return None


def is_dora_per_output(leaves: Mapping[str, tuple[int, ...]]) -> bool:
    """Return True if programs take DoRA's magnitudes for one per output row: the first axis is as long as the weight's.

    That holds for magnitudes per input, (1, I), too if the weight has one row.
    """
    magnitudes = leaves.get("dora_scale")
    return magnitudes is not None and (magnitudes[:1] != (1,) or count_outputs(leaves) == 1)


def count_outputs(leaves: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the number of outputs of the layer that a module changes; None for factors that do not tell."""
    for up in ("lora_up.weight", "lora_B.weight"):
        if up in leaves:
            return leaves[up][0]
    if "hada_w1_a" in leaves:  # (O, R), or (R, O) with a core
        return leaves["hada_w1_a"][1 if "hada_t1" in leaves else 0]
    outer = leaves.get("lokr_w1", leaves.get("lokr_w1_a"))
    inner = leaves.get("lokr_w2", leaves.get("lokr_w2_a", ())[:: -1 if LOKR_CORE in leaves else 1])
    return outer[0] * inner[0] if outer and inner else None


# --- files that a program refuses as a whole ---


def explain_refused(program: Program, content: Content, reader: Reader, num_unknown: int) -> str | None:
    """Return why a program refuses the whole file, or None if it reads it."""
    if program == "Forge" and num_unknown > FORGE_MAX_UNKNOWN_KEYS:
        return f"it refuses a file with more than {FORGE_MAX_UNKNOWN_KEYS} keys that it does not know"
    if program in ("Forge", "stable-diffusion.cpp") and any(LOKR_CORE in leaves for leaves in content.leaves.values()):
        return "it fails on LoKr with a Tucker core"
    if program == "diffusers" and (refusal := next(filter(None, (r(content) for r in DIFFUSERS_REFUSALS)), None)):
        return refusal
    return reader.refuses({key.module: key.naming for key in content.keys})


def explain_mixed_namings(content: Content) -> str | None:
    namings = {key.naming for key in content.keys if key.naming is not None}
    if "kohya" in namings and len(namings) > 1:
        return "it refuses a file that mixes kohya's names with others"
    return None


def explain_foreign_leaves(content: Content) -> str | None:
    foreign = sorted({key.leaf or key.text for key in content.keys if key.leaf not in DIFFUSERS_LEAVES})
    return f"it uses nothing from a file with {', '.join(foreign[:3])}" if foreign else None


def explain_missing_lora(content: Content) -> str | None:
    """Refuse separate alphas: in every naming but kohya's, diffusers requires "lora" in each key."""
    alphas = [
        key.text for key in content.keys if key.naming != "kohya" and "lora" not in key.text and key.leaf == "alpha"
    ]
    return "it refuses .alpha in addition to lora_A and lora_B" if alphas else None


def explain_lone_alphas(content: Content) -> str | None:
    return "it refuses a file with alphas that have no weights" if any(map(content.is_lone, content.keys)) else None


DIFFUSERS_REFUSALS: tuple[Callable[[Content], str | None], ...] = (
    explain_mixed_namings,
    explain_foreign_leaves,
    explain_missing_lora,
    explain_lone_alphas,
)


def programs_that_read(spec: BaseModelSpec, naming: FileNaming) -> list[Program]:
    """Return the programs that read a base model's denoiser keys in a naming."""
    return [program for program, reader in spec.readers.items() if naming in reader.denoiser]


# --- messages ---


def describe(program_readings: Sequence[Reading]) -> str:
    """Summarise in one line which programs use all, some or none of the keys."""
    if not program_readings:
        return "its base model cannot be recognised from its keys"
    groups = (
        ("all used by", [r.program for r in program_readings if r.amount == "all"]),
        ("some by", [f"{r.program} ({r.num_used} of {r.num_keys})" for r in program_readings if r.amount == "some"]),
        ("none by", [r.program for r in program_readings if r.amount == "none"]),
    )
    return "; ".join(f"{label} {', '.join(programs)}" for label, programs in groups if programs)


def problems(program_readings: Sequence[Reading]) -> Iterator[str]:
    """Yield one line for each program and reason, and few of many reasons."""
    for reading in program_readings:
        for reason in reading.reasons[:MOST_REASONS]:
            yield f"{reading.program}: {reason}"
        if len(reading.reasons) > MOST_REASONS:
            yield f"{reading.program}: {len(reading.reasons) - MOST_REASONS} more reasons"
