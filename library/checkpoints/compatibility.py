"""What programs that make pictures will do with an adapter file, by its keys and shapes alone.

The rules were found by giving files of every form to each program's own loading code: ComfyUI 0.29, diffusers 0.42,
Forge and stable-diffusion.cpp in 2026; "A1111-style" are the loaders in the manner of AUTOMATIC1111's web UI.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal

from library.checkpoints.adapter_keys import AdapterKey, is_of_text_encoder, tells_no_model, underscored
from library.checkpoints.adapter_names import NAMINGS, FileNaming
from library.checkpoints.base_model_spec import PROGRAMS, BaseModelSpec, Program, Reader
from library.checkpoints.recognition import recognise_adapter

Part = Literal["denoiser", "text"]
Amount = Literal["all", "some", "none"]

FORGE_MAX_UNKNOWN_KEYS = 12


@dataclass(frozen=True)
class Key:
    """One key of an adapter file."""

    text: str
    module: str  # without the leaf, underscores for dots
    leaf: str
    shape: tuple[int, ...]
    naming: FileNaming | None  # None: of no program
    part: Part


@dataclass(frozen=True)
class Reading:
    """What one program does with a file."""

    program: Program
    num_keys: int
    unused: tuple[str, ...]  # keys that change nothing there
    inexact: tuple[str, ...]  # keys that are applied, but not as they were trained
    reasons: tuple[str, ...]  # why, one sentence each

    @property
    def num_used(self) -> int:
        """Keys that act as trained."""
        return self.num_keys - len(self.unused) - len(self.inexact)

    @property
    def amount(self) -> Amount:
        """How much of the file acts as trained."""
        if self.num_used == self.num_keys:
            return "all"
        return "some" if self.num_used else "none"


# --- which kinds of weights are read where ---

LOW_RANK = frozenset(("lora_down.weight", "lora_up.weight", "lora_A.weight", "lora_B.weight", "alpha"))
NORM = frozenset(("w_norm", "b_norm"))
OFT = frozenset(("oft_blocks", "rescale"))
GLORA = frozenset(f"{side}{n}.weight" for side in "ab" for n in (1, 2))
FULL = frozenset(("diff", "diff_b"))  # changes of whole weights and biases
LOKR_CORE = "lokr_t2"
OFT_PREFIX = "oft_unet_"  # of the names in files by networks.oft
READ = re.compile(  # endings that programs look for
    r"lora_(?:down|up|mid|A|B)\.weight|alpha|dora_scale|w_norm|b_norm|hada_(?:w[12]_[ab]|t[12])"
    r"|lokr_(?:w[12](?:_[ab])?|t2)|oft_blocks|rescale|[ab][12]\.weight|diff(?:_b)?|lora_magnitude_vector(?:\.weight)?"
)
PEFT_MAGNITUDES = frozenset(("lora_magnitude_vector", "lora_magnitude_vector.weight"))  # of DoRA per output
DIFFUSERS_LEAVES = LOW_RANK | PEFT_MAGNITUDES | {"dora_scale"}


def readings(
    specs: Sequence[BaseModelSpec],
    shapes: Mapping[str, Sequence[int]],
    metadata: Mapping[str, str],
    alphas: Mapping[str, float] = MappingProxyType({}),
) -> tuple[Reading, ...]:
    """Return how each program reads an adapter file with these keys; empty if its base model is not recognised.

    `alphas` has the values of `alpha` keys where they are known: those of OFT are limits, and 0 is none.
    """
    spec = recognise_adapter(specs, shapes, metadata)
    if spec is None:
        return ()
    keys = tuple(parse(text, tuple(shape)) for text, shape in shapes.items())
    content = Content(spec, keys, frozenset(key.module for key in keys if alphas.get(key.text) == 0))
    return tuple(read_by(program, content) for program in PROGRAMS)


def parse(text: str, shape: tuple[int, ...]) -> Key:
    """Take a key apart; one whose ending or prefix no program knows keeps its text and has no naming."""
    found = AdapterKey.parse(text)
    if found is None or READ.fullmatch(found.ending) is None:
        return Key(text, underscored(text), "", shape, None, part_of(text))
    naming = next((naming for naming in NAMINGS if naming == found.naming), None)
    if re.match(r"model\.diffusion_model\.", found.module) or (naming == "kohya" and "." in found.module):
        naming = None  # names of a whole checkpoint
    if tells_no_model(found.module):
        naming = None  # some programs look for some of these, but for each base model others
    return Key(text, underscored(found.module), found.ending, shape, naming, part_of(found.module))


def part_of(module: str) -> Part:
    return "text" if is_of_text_encoder(module) else "denoiser"


@dataclass(frozen=True)
class Content:
    """A file as the rules see it."""

    spec: BaseModelSpec
    keys: tuple[Key, ...]
    without_limit: frozenset[str]  # modules whose alpha is 0

    @cached_property
    def leaves(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """Module -> leaf -> shape."""
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for key in self.keys:
            found.setdefault(key.module, {})[key.leaf] = key.shape
        return found

    @cached_property
    def strangers(self) -> frozenset[str]:
        """Modules that the base model does not have."""
        return frozenset(module for module in self.leaves if self.spec.names.find(module) is None)

    def is_lone(self, key: Key) -> bool:
        """Return True for the alpha of a module that has no weights."""
        return self.leaves[key.module].keys() == {"alpha"}


def read_by(program: Program, content: Content) -> Reading:
    """Apply the rules of one program to a file."""
    keys = content.keys
    reader = content.spec.readers.get(program)
    if reader is None:
        reason = f"it takes no adapters of {content.spec.title}"
        return Reading(program, len(keys), tuple(key.text for key in keys), (), (reason,))
    unused: dict[str, str] = {}
    for key in keys:
        reason_unused = why_unused(program, content, key, reader)
        if reason_unused is not None:
            unused[key.text] = reason_unused
    refusal = why_refused(program, content, reader, len(unused))
    if refusal is not None:
        return Reading(program, len(keys), tuple(key.text for key in keys), (), (refusal,))
    unused |= {key.text: "alphas without weights change nothing" for key in keys if content.is_lone(key)}
    inexact = {
        key.text: why
        for key in keys
        if key.text not in unused and (why := why_inexact(program, content, key)) is not None
    }
    reasons = tuple(dict.fromkeys([*unused.values(), *inexact.values()]))
    return Reading(program, len(keys), tuple(unused), tuple(inexact), reasons)


def why_unused(program: Program, content: Content, key: Key, reader: Reader) -> str | None:
    """Why a key changes nothing in a program, None when it acts."""
    if key.naming is None:
        return f"it is not known to read keys such as {key.text}"
    if key.naming not in (reader.denoiser if key.part == "denoiser" else reader.text):
        what = "text encoder keys in " if key.part == "text" else "keys in "
        return f"it does not read {what}the {key.naming} naming"
    if key.module.startswith(OFT_PREFIX) and program != "A1111-style":
        return f"it does not look for names that begin with {OFT_PREFIX}"
    if key.module in content.strangers:
        return f"{content.spec.title} has no modules with some of the file's names"
    for gap in reader.gaps:
        if key.naming in gap.namings and re.fullmatch(gap.modules, key.module):
            return gap.reason
    return why_leaf_unused(program, content, key)


def why_leaf_unused(program: Program, content: Content, key: Key) -> str | None:
    """The same, for the kind of weight."""
    if program == "stable-diffusion.cpp" and key.leaf in NORM | {"dora_scale"}:
        return "it has no norm weights and no DoRA: what is left acts as plain LoRA"
    if program in ("Forge", "stable-diffusion.cpp") and content.leaves[key.module].keys() & OFT:
        return "it has no OFT"
    if program != "ComfyUI" and content.leaves[key.module].keys() & (GLORA | FULL):
        return "it is not known to read GLoRA and changes of whole weights"
    if program == "ComfyUI" and LOKR_CORE in content.leaves[key.module]:
        return "it skips layers that have LoKr with a Tucker core"
    if key.leaf in PEFT_MAGNITUDES and (program != "diffusers" or key.naming != "diffusers"):
        return "it does not look for lora_magnitude_vector: what is left acts as plain LoRA"
    if key.leaf == "lora_magnitude_vector" and key.part == "text":
        return (
            "for text encoders it looks for lora_magnitude_vector.weight: what is left acts as DoRA of other magnitudes"
        )
    if program == "diffusers" and key.leaf == "dora_scale":
        return "it drops dora_scale: what is left acts as plain LoRA"
    if program == "ComfyUI" and key.leaf in NORM and key.part == "text":
        return "it does not look for norms of text encoders"
    if program == "A1111-style" and key.leaf in NORM and not content.leaves[key.module].keys() >= NORM:
        return "it needs w_norm and b_norm of a module together"
    return None


def why_inexact(program: Program, content: Content, key: Key) -> str | None:
    """Why a key that acts does not act as it was trained, None when it does."""
    leaves = content.leaves[key.module]
    if program in ("ComfyUI", "Forge", "A1111-style") and is_dora_per_output(leaves):
        return "DoRA with one magnitude per output acts differently there than in training"
    has_limit = "alpha" in leaves and key.module not in content.without_limit
    if program == "ComfyUI" and leaves.keys() & OFT and (has_limit or "rescale" in leaves):
        return "it turns OFT within a limit of alpha, not alpha times the outputs, and leaves out rescale"
    if program == "stable-diffusion.cpp" and leaves.keys() & {"lora_mid.weight", "hada_t1", "hada_t2"}:
        return "it multiplies Tucker cores the wrong way round"
    return None


def is_dora_per_output(leaves: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the magnitudes are of output rows: programs see that the first axis is as long as the weight's."""
    return leaves.get("dora_scale", (1,))[:1] != (1,)


# --- files that a program refuses as a whole ---


def why_refused(program: Program, content: Content, reader: Reader, num_unknown: int) -> str | None:
    """Why a program takes nothing from a file, None when it reads it."""
    if program == "Forge" and num_unknown > FORGE_MAX_UNKNOWN_KEYS:
        return f"it refuses a file with more than {FORGE_MAX_UNKNOWN_KEYS} keys that it does not know"
    if program in ("Forge", "stable-diffusion.cpp") and any(LOKR_CORE in leaves for leaves in content.leaves.values()):
        return "it fails on LoKr with a Tucker core"
    if program == "diffusers" and (refusal := next(filter(None, (r(content) for r in DIFFUSERS_REFUSALS)), None)):
        return refusal
    return reader.refuses({key.module: key.naming for key in content.keys})


def mixes_namings(content: Content) -> str | None:
    namings = {key.naming for key in content.keys if key.naming is not None}
    if "kohya" in namings and len(namings) > 1:
        return "it refuses a file that mixes kohya's names with others"
    return None


def has_foreign_leaves(content: Content) -> str | None:
    foreign = sorted({key.leaf or key.text for key in content.keys if key.leaf not in DIFFUSERS_LEAVES})
    return f"it takes nothing from a file with {', '.join(foreign[:3])}" if foreign else None


def has_keys_without_lora(content: Content) -> str | None:
    """Outside kohya's naming every key must have "lora" in it."""
    odd = [key.text for key in content.keys if key.naming != "kohya" and "lora" not in key.text and key.leaf == "alpha"]
    return "it refuses .alpha beside lora_A and lora_B" if odd else None


def has_lone_alphas(content: Content) -> str | None:
    return "it refuses a file with alphas that have no weights" if any(map(content.is_lone, content.keys)) else None


DIFFUSERS_REFUSALS: tuple[Callable[[Content], str | None], ...] = (
    mixes_namings,
    has_foreign_leaves,
    has_keys_without_lora,
    has_lone_alphas,
)


def programs_that_read(spec: BaseModelSpec, naming: FileNaming) -> list[Program]:
    """The programs that take the denoiser's keys of a base model in a naming."""
    return [program for program, reader in spec.readers.items() if naming in reader.denoiser]


# --- in words ---


def describe(found: Sequence[Reading]) -> str:
    """One line: which programs use all, some or none of the keys."""
    if not found:
        return "its keys do not tell which base model they are for"
    groups = (
        ("all used by", [r.program for r in found if r.amount == "all"]),
        ("some by", [f"{r.program} ({r.num_used} of {r.num_keys})" for r in found if r.amount == "some"]),
        ("none by", [r.program for r in found if r.amount == "none"]),
    )
    return "; ".join(f"{what} {', '.join(programs)}" for what, programs in groups if programs)


def problems(found: Sequence[Reading]) -> Iterator[str]:
    """One sentence for each program and reason."""
    for reading in found:
        for reason in reading.reasons:
            yield f"{reading.program}: {reason}"
