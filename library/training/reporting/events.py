"""The events of a run as values: the lines of the events file, from which the report is made too.

docs/events.md describes them for people, docs/events.schema.json for programs; a test holds the three together. A
field that is added leaves VERSION as it is; one that goes or changes its meaning raises it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypedDict

from library.progress import State

VERSION = 1

EndReason = Literal["finished", "stopped", "already complete", "error"]
SavedKind = Literal["weights", "state"]
SavedFor = Literal["step", "epoch", "best", "end"]


@dataclass(frozen=True)
class Event:
    """The base of all events; `event` is the name that a line carries."""

    event: ClassVar[str]

    def as_line(self, time: float) -> dict[str, Any]:
        """Return the line as JSON has it, but for numbers that are not finite; `time` is in seconds since 1970."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"v": VERSION, "event": self.event, "time": round(time, 3), **values}


@dataclass(frozen=True)
class Start(Event):
    """A process begins a run, or goes on with one. Nothing is loaded yet."""

    event = "start"
    command: Sequence[str] | None  # the words after the script's name; None where a program called it
    options: Mapping[str, Any]  # those that differ from their defaults
    versions: Mapping[str, str]  # by package, and `commit` of this suite where git knows it


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
    num_draws: int  # repeats included
    num_batches: int


class AuditedDataset(TypedDict):
    """One [[datasets]] table of the dataset file."""

    resolution: Sequence[int]
    batch_size: int
    subsets: Sequence[AuditedSubset]
    buckets: Sequence[AuditedBucket]


class CaptionLengths(TypedDict):
    """How many captions have which length: rows of [length, count]."""

    unit: Literal["tokens", "words"]
    most: int | None  # tokens that reach the model
    counts: Sequence[Sequence[int]]


@dataclass(frozen=True)
class FoundImage:
    """An image of a finding; `thumbnail` is a data: URL of a smaller copy, None where there is none."""

    file: str
    note: str
    thumbnail: str | None


@dataclass(frozen=True)
class Audit(Event):
    """The findings of the dataset audit, as library/data/plan/audit_values.py collects them."""

    event = "audit"
    datasets: Sequence[AuditedDataset]
    dropped: Sequence[Mapping[str, str]]
    num_dropped: int
    caption_lengths: CaptionLengths
    tags: Sequence[Sequence[Any]]
    pairs: Sequence[FoundImage] = ()  # the first images with references, which are on their left


@dataclass(frozen=True)
class Finding(Event):
    """Something stands out in the pixels of the images, of which the first are told."""

    event = "finding"
    text: str
    pictures: Sequence[FoundImage]
    num_pictures: int


@dataclass(frozen=True)
class Stage(Event):
    """A part of the run that takes its time, such as caching; `total` is None where no end is known."""

    event = "stage"
    name: str
    state: State
    done: int | None = None
    total: int | None = None


@dataclass(frozen=True)
class Planned:
    """The planner's prediction for the largest batch of one process."""

    card_bytes: int  # with what the card and its allocator add
    tensor_bytes: int  # of them, at the peak
    seconds: float  # of a forward and backward pass


@dataclass(frozen=True)
class Plan(Event):
    """Everything is loaded and training is about to begin."""

    event = "plan"
    base_model: str
    network: str
    num_trained: int  # parameters
    seed: int
    first_step: int  # finished before; 0 unless the run goes on
    resumed_from: str | None
    max_train_steps: int
    num_epochs: int
    steps_per_epoch: int
    batch_sizes: Sequence[int]
    accumulation: int  # batches of a step, over all processes
    pictures: Mapping[str, int]  # train, validation, reg; repeats included
    num_processes: int
    device: str
    peak_flops: float | None  # of one card in the number format of training, per second
    planned: Planned | None = None  # None without --fit


@dataclass(frozen=True)
class Timing:
    """Where the time of a step went; cards are read one step late, so it is that of `step`, usually the one before."""

    step: int
    seconds: float
    parts: Mapping[str, float]  # seconds of waiting for data, copying, forward, backward, optimizer
    pictures_per_second: float  # of all processes
    tflops: float | None  # of one card, per second
    mfu: float | None  # a share of `peak_flops`


@dataclass(frozen=True)
class Norms:
    """Euclidean norms of one group of parameters after a step; the gradient's before clipping."""

    weight: float
    gradient: float


@dataclass(frozen=True)
class Memory:
    """Bytes of this process: `card` and `card_peak` are torch's on a CUDA device, `main_peak` is main memory."""

    card: int | None
    card_peak: int | None
    main_peak: int | None


@dataclass(frozen=True)
class Step(Event):
    """An optimizer step is finished. A loss that is not a finite number is null."""

    event = "step"
    step: int
    epoch: int
    loss: float  # the mean of the step's batches
    average: float  # the mean of the last loss of every batch of an epoch
    learning_rates: Mapping[str, float]  # by group
    gradient_norm: float | None  # of all groups, before clipping
    timing: Timing | None
    norms: Mapping[str, Norms] | None  # by group; of every tenth step
    memory: Memory | None  # of every tenth step


@dataclass(frozen=True)
class Level:
    """The loss at one noise level; `error` is its standard error over images, None for a single image."""

    level: int
    loss: float
    error: float | None


@dataclass(frozen=True)
class Compared:
    """How an evaluation differs from the first: the mean over images, its standard error, whether that is clear."""

    to_step: int
    mean: float
    error: float | None
    is_clear: bool


@dataclass(frozen=True)
class Preference:
    """Implicit rewards of held-out pairs: the share that prefers the right image, and the mean margin."""

    accuracy: float
    margin: float | None  # None where a loss is not a number


@dataclass(frozen=True)
class Validation(Event):
    """The images that are set aside were measured."""

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


@dataclass(frozen=True)
class Forgetting(Event):
    """The images of subsets with `is_forgetting_probe` were measured, as in validation."""

    event = "forgetting"
    step: int
    loss: float
    error: float | None
    num_pictures: int
    compared: Compared | None  # None for the first evaluation


@dataclass(frozen=True)
class Memorised:
    """How much more the loss fell on trained images than on unseen ones, with its interval."""

    more: float
    low: float | None
    high: float | None
    unseen: Literal["held-out", "mirrored"]  # images that were set aside, or the trained ones mirrored


@dataclass(frozen=True)
class Forgotten:
    """How much the loss of the forgetting probe rose since before training, with its interval."""

    more: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Candidate:
    """A file that was compared; `file` is None for the model before training. Intervals are None for one image."""

    file: str | None
    step: int
    loss: float
    low: float | None
    high: float | None
    difference: float  # to the lowest loss of a file, image by image
    difference_low: float | None  # of these intervals all hold together
    difference_high: float | None
    is_worse: bool  # than the best, by more than chance
    memorised: Memorised | None = None  # None where trained images were not measured
    forgotten: Forgotten | None = None  # None without a forgetting probe


@dataclass(frozen=True)
class Choice(Event):
    """The saved files were compared on the same images; see library/training/evaluation/choice.py."""

    event = "choice"
    suggested: str | None
    step: int | None
    has_winner: bool  # every other file is worse by more than chance
    reason: str
    num_pictures: int
    confidence: float
    candidates: Sequence[Candidate]


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
    thumbnail: str  # a data: URL of a smaller copy
    strength: float = 1.0  # of the adapter


@dataclass(frozen=True)
class Strengths(Event):
    """The images of one prompt were compared that differ in the adapter's strength."""

    event = "strengths"
    step: int
    epoch: int
    prompt: str
    seed: int | None
    strengths: Sequence[float]  # the lowest first
    changes: Sequence[float]  # from the first image, 0, to the last, 1
    correlation: float | None  # of the ranks of both; null where all images are equal


@dataclass(frozen=True)
class Saved(Event):
    """A file of weights, or the folder of a state, was written."""

    event = "saved"
    kind: SavedKind
    reason: SavedFor
    step: int
    epoch: int
    file: str
    num_bytes: int


@dataclass(frozen=True)
class Removed(Event):
    """An older file or folder was deleted, as the user asked."""

    event = "removed"
    file: str


@dataclass(frozen=True)
class Warned(Event):
    """A warning or an error that was logged."""

    event = "warning"
    level: str
    logger: str
    text: str


@dataclass(frozen=True)
class End(Event):
    """The run is over. A process that is killed writes none."""

    event = "end"
    reason: EndReason
    step: int | None  # finished; None where training did not begin
    seconds: float  # since `start`
    error: str | None
    summary: str | None  # of the steps' times, in words
    file: str | None  # the adapter, of a run that came to its end
