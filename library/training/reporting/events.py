"""The events of a run: lines of the events file, and the source of the report.

docs/events.md describes them for people, docs/events.schema.json for programs: tests/schemas.py writes it from the
types and comments here. Adding a field keeps VERSION; removing one or changing its meaning raises it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal, TypedDict

from library.base.error_lines import ErrorFields
from library.base.progress import State

VERSION = 1

EndReason = Literal["finished", "stopped", "already complete", "error"]
EndCause = Literal["early stopping", "non-finite"]
SavedKind = Literal["weights", "state"]
SavedFor = Literal["step", "epoch", "best", "end"]
Finite = Annotated[float, {"type": "number"}]
Seconds = Annotated[float, {"type": "number", "minimum": 0}]
FromOne = Annotated[int, {"minimum": 1}]
Image = Annotated[str, {"pattern": "^data:image/webp;base64,[A-Za-z0-9+/]+=*$"}]


@dataclass(frozen=True)
class Event:
    """Base class of all events; `event` is the name in a line."""

    event: ClassVar[str]

    def as_line(self, time: float) -> dict[str, Any]:
        """Return the line's JSON values (numbers may be non-finite); `time` is in seconds since 1970."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"v": VERSION, "event": self.event, "time": round(time, 3), **values}


@dataclass(frozen=True)
class Start(Event):
    """A process starts or resumes a run. Nothing is loaded yet."""

    event = "start"
    command: Sequence[str] | None  # arguments of the script, keys and tokens hidden; None if a program called it
    options: Mapping[str, Any]  # those not at their defaults
    versions: Mapping[str, str]  # by package; `commit` of this suite if git knows it


class AuditedSubset(TypedDict):
    """The images of one subset."""

    source: str
    num_pictures: int
    num_repeats: int
    is_reg: bool
    num_without_caption: int


class AuditedBucket(TypedDict):
    """The images trained at one size."""

    width: int
    height: int
    num_draws: int  # including repeats
    num_batches: int


class AuditedDataset(TypedDict):
    """One [[datasets]] table."""

    resolution: tuple[int, int]
    batch_size: int
    subsets: Sequence[AuditedSubset]
    buckets: Sequence[AuditedBucket]


class CaptionLengths(TypedDict):
    """The distribution of caption lengths: rows of [length, count]."""

    unit: Literal["tokens", "words"]
    most: int | None  # the model's limit in tokens
    counts: Sequence[tuple[int, int]]  # [length, number of captions], sorted by length


class DroppedImage(TypedDict):
    """A skipped image."""

    file: str
    reason: str


class CountedImages(TypedDict):
    """Numbers of images, including repeats."""

    train: int
    validation: int
    reg: int


@dataclass(frozen=True)
class FoundImage:
    """An image of a finding; `thumbnail` is a data: URL of a smaller copy, or None."""

    file: str
    note: str
    thumbnail: str | None


@dataclass(frozen=True)
class Audit(Event):
    """The result of the dataset audit, collected by library/data/plan/audit_values.py."""

    event = "audit"
    datasets: Sequence[AuditedDataset]
    dropped: Sequence[DroppedImage]  # the first 100
    num_dropped: int
    caption_lengths: CaptionLengths
    tags: Sequence[tuple[str, int]]  # [tag, number of captions that have it] of the 50 most common tags
    pairs: Sequence[FoundImage] = ()  # the first images with references or partners, which are shown on their left


@dataclass(frozen=True)
class Finding(Event):
    """A problem found in the images' pixels, with the first affected images."""

    event = "finding"
    text: str
    pictures: Sequence[FoundImage]
    num_pictures: int


@dataclass(frozen=True)
class StageProgress(Event):
    """A long part of the run, such as caching; `total` is None if unknown."""

    event = "stage"
    name: str
    state: State
    done: int | None = None
    total: int | None = None


@dataclass(frozen=True)
class Planned:
    """The planner's prediction for one process's largest batch."""

    card_bytes: int  # including what the GPU and its allocator add
    tensor_bytes: int  # peak of the tensors alone
    seconds: Seconds  # of a forward and backward pass


@dataclass(frozen=True)
class TrainingPlan(Event):
    """Everything is loaded and training is about to start."""

    event = "plan"
    base_model: str
    network: str
    num_trained: int  # parameters
    seed: int
    first_step: int  # finished before this process; 0 unless resumed
    resumed_from: str | None  # folder of the state
    max_train_steps: int
    num_epochs: int
    steps_per_epoch: int
    batch_sizes: Sequence[int]
    accumulation: int  # batches per step, over all processes
    pictures: CountedImages
    num_processes: int
    device: str  # name of the GPU, or cpu
    peak_flops: float | None  # of one GPU in the compute dtype, per second
    planned: Planned | None = None  # None without --fit


@dataclass(frozen=True)
class Timing:
    """The time spent in a step. GPU times are read one step late, so `step` is usually the previous one."""

    step: int
    seconds: Seconds
    parts: Mapping[str, Seconds]  # seconds spent waiting for data, copying, forward, backward, optimizer
    pictures_per_second: Finite  # over all processes
    tflops: float | None  # of one GPU, per second
    mfu: float | None  # fraction of `peak_flops`


@dataclass(frozen=True)
class Norms:
    """Euclidean norms of a parameter group after a step; that of the gradient is before clipping."""

    weight: float
    gradient: float


@dataclass(frozen=True)
class Memory:
    """Bytes of this process: `card` and `card_peak` of tensors on a CUDA device, `card_reserved_peak` taken from it by
    torch, `main_peak` in main memory."""

    card: int | None
    card_peak: int | None
    card_reserved_peak: int | None
    main_peak: int | None


@dataclass(frozen=True)
class Step(Event):
    """A finished optimizer step. A non-finite loss is null."""

    event = "step"
    step: FromOne  # number of finished steps
    epoch: FromOne
    loss: float  # mean over the step's batches
    average: float  # mean of the latest losses of all batches of an epoch
    learning_rates: Mapping[str, float]  # by group
    gradient_norm: float | None  # over all groups, before clipping
    timing: Timing | None
    norms: Mapping[str, Norms] | None  # by group; every tenth step
    memory: Memory | None  # every tenth step


@dataclass(frozen=True)
class Level:
    """The loss at one noise level; `error` is its standard error over images, None for a single image."""

    level: int  # timestep, 0 to 999
    loss: float
    error: float | None


@dataclass(frozen=True)
class Compared:
    """An evaluation's difference to the first one: mean over images, standard error, and whether it is significant."""

    to_step: int
    mean: float
    error: float | None
    is_clear: bool  # whether the difference exceeds twice its standard error


@dataclass(frozen=True)
class Preference:
    """Implicit rewards of held-out pairs: the share that prefers the right image, and the mean margin."""

    accuracy: float
    margin: float | None  # None if a loss is not finite


@dataclass(frozen=True)
class Validation(Event):
    """The held-out images were measured."""

    event = "validation"
    step: int
    loss: float
    error: float | None
    levels: Sequence[Level]
    num_pictures: int
    compared: Compared | None  # None for the first evaluation
    best_step: int
    best_loss: float | None
    preference: Preference | None  # None without --preference_loss
    losses: Mapping[str, float] = field(default_factory=dict)  # of each held-out image, by the digest of its content


@dataclass(frozen=True)
class Forgetting(Event):
    """The forgetting probe (subsets with `is_forgetting_probe`) was measured, as in validation."""

    event = "forgetting"
    step: int
    loss: float
    error: float | None
    num_pictures: int
    compared: Compared | None  # None for the first evaluation


@dataclass(frozen=True)
class Memorised:
    """The memorization gap: how much more the loss fell on training images than on unseen ones, with its interval."""

    more: float
    low: float | None
    high: float | None
    unseen: Literal["held-out", "mirrored"]  # held-out images, or mirrored training images


@dataclass(frozen=True)
class Forgotten:
    """How much the forgetting probe's loss rose since before training, with its interval."""

    more: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Score:
    """A score of the images that a file draws: its mean, and the mean difference, image by image, to the file with the
    lowest loss. The intervals of a score's differences hold simultaneously; those of one image are None."""

    mean: float
    difference: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Candidate:
    """A compared file; `file` is None for the model before training. Intervals are None for a single image."""

    file: str | None
    step: int
    loss: float
    low: float | None
    high: float | None
    difference: float  # to the lowest loss, image by image
    difference_low: float | None  # these intervals hold simultaneously
    difference_high: float | None
    is_worse: bool  # significantly worse than the best
    memorised: Memorised | None = None  # None if training images were not measured
    forgotten: Forgotten | None = None  # None without a forgetting probe
    scores: Mapping[str, Score] | None = None  # by name; None without --score_previews


@dataclass(frozen=True)
class FileChoice(Event):
    """The saved files were compared on the same images; see library/training/evaluation/choice.py."""

    event = "choice"
    suggested: str | None  # the file to keep; None if the data decide nothing
    step: int | None
    has_winner: bool  # every other file is significantly worse
    reason: str
    num_pictures: int
    confidence: Finite  # level of the intervals
    candidates: Sequence[Candidate]  # sorted by step, the model before training first


@dataclass(frozen=True)
class Preview(Event):
    """An image was drawn."""

    event = "preview"
    step: int
    epoch: int
    index: int  # of its prompt
    prompt: str
    seed: int | None
    width: int
    height: int
    file: str
    thumbnail: Image  # data: URL of a copy of at most 256 pixels
    strength: float = 1.0  # of the adapter


@dataclass(frozen=True)
class Strengths(Event):
    """One prompt's images at several adapter strengths were compared."""

    event = "strengths"
    step: int
    epoch: int
    prompt: str
    seed: int | None
    strengths: Sequence[Finite]  # in ascending order
    changes: Sequence[float]  # from the first image, 0, to the last, 1
    correlation: float | None  # rank correlation of both; null if all images are equal


@dataclass(frozen=True)
class Scores(Event):
    """The previews of a step were scored; those at other strengths than 1 are left out."""

    event = "scores"
    step: int
    epoch: int
    scores: Mapping[str, Sequence[float]]  # by name, one for each image


@dataclass(frozen=True)
class Saved(Event):
    """A weights file or a state folder was written."""

    event = "saved"
    kind: SavedKind
    reason: SavedFor  # step is also the reason for the file of a stopped run
    step: int
    epoch: int
    file: str
    num_bytes: int


@dataclass(frozen=True)
class Removed(Event):
    """An outdated file or folder was deleted, as the options request."""

    event = "removed"
    file: str


@dataclass(frozen=True)
class Warned(Event):
    """A logged warning or error."""

    event = "warning"
    level: Annotated[str, {"enum": ["warning", "error", "critical"]}]
    logger: str
    text: str


@dataclass(frozen=True)
class End(Event):
    """The run ended. A killed process writes none."""

    event = "end"
    reason: EndReason
    step: int | None  # finished steps; None if training did not start
    seconds: Finite  # since `start`
    error: str | None
    summary: str | None  # of the steps' times, as text
    file: str | None  # the adapter, if the run is complete
    details: ErrorFields | None = None  # of the error
    cause: EndCause | None = None  # what ended it before its last step
