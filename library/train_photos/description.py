"""The plan of a run as the user reads it."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from library.base.formatting import format_count, format_gib
from library.data.description.captions import has_word
from library.environment.requirements import quote
from library.options.model import BASE, TRAINING_ADAPTER
from library.train_photos.photos import PhotoFolder, Trigger
from library.train_photos.plan import REFUSED_ADAPTER, Files, Plan
from library.training.planning.settings import describe
from library.training.reporting.console_lines import duration
from tools.contact_sheet import find_device
from tools.recipes import MOST_STEPS

NUM_CAPTIONS = 3  # that are shown
MOST_COMPARED = 200  # captions
NUM_PARTS = 3  # of the time that are shown
MOST_WORDS = 3  # of a trigger
ADAPTERS = {TRAINING_ADAPTER, "base_weights", "network_weights"}
DISTILLED = (
    "this base is distilled: training undoes that. Train on the model that it was made from, and use the LoRA with both"
)
# Words that any base model knows, and names that systems and cameras give to folders.
COMMON = re.compile(
    "man|woman|boy|girl|person|face|people|cat|dog|animal|car|house|style|art|photos?|pictures?|images?|pics|img|dcim|"
    "camera|folder|newfolder|untitledfolder|desktop|downloads|data|dataset|train|training|test|subject"
)


def describe_plan(plan: Plan, files: Files) -> list[str]:
    """Return the plan as lines."""
    values, order, base = plan.values, plan.order, plan.order.base
    prediction = ""
    if plan.predicted is not None:
        what = "velocity" if plan.predicted.prediction == "v" else "noise"
        prediction = f"; it predicts {what} ({plan.predicted.why})"
    steps, every = values["max_train_steps"], values["save_every_n_steps"]
    lines = [
        f"base      {base.title}: {base.name}{prediction}",
        *(f"part      --{name} {format_value(values[name])}" for name in list_part_names(plan)),
        f"photos    {describe_photos(order.folders)}",
        *list_folders(order.folders),
        *(f"kept      {finding.line}" for finding in plan.findings),
        f"captions  {describe_captions(order.folders, order.trigger)}",
        *list_captions(plan),
        *list_class_images(order.args.class_images, order.trigger),
        f"recipe    {order.recipe.name}: {order.recipe.title}",
        f"training  {describe_size(plan)}, batches of {values['train_batch_size']}, {steps} steps"
        + (f": each photo is seen {plan.times_seen:.0f} times" if plan.times_seen else "")
        + (f"; {values['validation_split']:.0%} of the photos only measure" if values.get("validation_split") else "")
        + ("; more only with --steps" if steps == MOST_STEPS else ""),
        f"takes     {describe_cost(plan)}",
        f"saves     {files.adapter}, a file every {every} steps, previews without it and with it",
    ]
    if order.given:
        lines.append(f"given     {describe_given(order.given, order.recipe.values)}")
    if plan.missing is not None:
        lines.append(f"note      {DISTILLED}, or put its training adapter beside it: {plan.missing}")
    elif base.is_distilled and not values.get("training_adapter") and not values.get("base_weights"):
        lines.append(f"note      {DISTILLED}")
    return lines


def list_class_images(number: int, trigger: Trigger) -> Iterator[str]:
    if number:
        what = f"{number} images of {trigger.subject!r}"
        yield f"class     {what}, which the base draws first; every second image of a step is one"


def list_part_names(plan: Plan) -> list[str]:
    """Return the options of the files beside the base that the run reads: parts, and adapters."""
    declared = plan.order.base.spec.options.declarations()
    parts = {name for name in declared if declared[name].path in ("part", "model")} - {BASE}
    given = {name for name, value in plan.values.items() if value and (name, value) != REFUSED_ADAPTER}
    return sorted(given & (parts | ADAPTERS))


def list_folders(folders: Sequence[PhotoFolder]) -> Iterator[str]:
    """Yield a line for each of several folders; what to do about those named as if they were not wanted comes last."""
    if len(folders) < 2:
        return
    for folder in sorted(folders, key=lambda folder: folder.is_unwanted):
        remark = f"; its name says that it is not wanted: --leave_out {quote(folder.path.name)}"
        counted = format_count(len(folder.photos), "photo")
        yield f"          {folder.path}: {counted}{remark if folder.is_unwanted and folder.photos else ''}"


def remark_on_trigger(trigger: Trigger) -> Iterator[str]:
    """Yield a remark on a trigger that is hard to call or that the base knows as something else."""
    advice = 'choose one that no model knows, and say what it is: --trigger "mycat, a cat"'
    if len(trigger.word.split()) > MOST_WORDS:
        yield f'the trigger "{shorten(trigger.word)}" is a sentence, and every prompt has to have all of it; {advice}'
    elif COMMON.fullmatch(trigger.word.lower()):
        yield f'"{trigger.word}" is a usual word, which prompts will have for other things too; {advice}'


def describe_size(plan: Plan) -> str:
    side, usual = (str(values["resolution"]).partition(",")[0] for values in (plan.values, plan.order.recipe.values))
    if side == usual or "resolution" in plan.order.given:
        return f"{side} px"
    return f"{side} px instead of {usual}, for the size of the base or the photos"


def describe_photos(folders: Sequence[PhotoFolder]) -> str:
    used, left_out = sum(len(f.photos) for f in folders), [item for f in folders for item in f.left_out]
    where = str(folders[0].path) if len(folders) == 1 else f"{len(folders)} folders"
    text = f"{used} of {used + len(left_out)} in {where}"
    reasons: dict[str, list[str]] = {}
    for path, reason in left_out:
        reasons.setdefault(reason, []).append(path.name)
    for reason, names in reasons.items():
        text += f"; left out: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "") + f", {reason}"
    return text


def describe_captions(folders: Sequence[PhotoFolder], trigger: Trigger) -> str:
    num_captions, num_photos = sum(len(f.captions) for f in folders), sum(len(f.photos) for f in folders)
    if not num_captions:
        return "none"
    num_naming = sum(has_word(caption, trigger.word) for folder in folders for caption in folder.captions)
    lacking = f'; "{trigger.word}" is put before {num_captions - num_naming}' if num_naming < num_captions else ""
    return f'{num_captions} of {num_photos} photos, "{trigger.word}" is in {num_naming}{lacking}'


def pick_captions(captions: Sequence[str]) -> list[str]:
    """Pick the captions that differ most from each other, beginning with the longest."""
    left = sorted(dict.fromkeys(captions), key=len, reverse=True)[:MOST_COMPARED]
    words = {caption: frozenset(re.findall(r"\w+", caption.lower())) for caption in left}

    def distance(one: str, other: str) -> float:
        both = words[one] | words[other]
        return len(words[one] ^ words[other]) / max(len(both), 1)

    picked = left[:1]
    while len(picked) < min(NUM_CAPTIONS, len(left)):
        others = [caption for caption in left if caption not in picked]
        picked.append(max(others, key=lambda caption: min(distance(caption, other) for other in picked)))
    return picked


def list_captions(plan: Plan) -> Iterator[str]:
    """Yield the captions that differ most as they are trained, and where folders have words of their own."""
    counts, folders, trigger = Counter(plan.captions), plan.order.folders, plan.order.trigger
    for caption in pick_captions(plan.captions):
        number = format_count(counts[caption], "photo")
        yield f'          trained as "{shorten(caption)}" ({number})'
    for folder in folders:
        if folder.own_words:
            wins = f'"{folder.describe_uncaptioned(trigger)}", '
            wins += "as given, and not its words" if trigger.is_given else "its words"
            yield f"          {folder.path.name}: each photo {folder.num_repeats} times; without a caption {wins}"
    if plan.order.recipe.name.endswith("_style") and not any(folder.captions for folder in folders):
        yield (
            "          without captions a style learns what the photos show as well: --caption, or text files that "
            "describe each, keep that out"
        )


def shorten(text: str, length: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[:length]} …"


def describe_given(given: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """Return the options that the user gave, and what they replace."""

    return "; ".join(
        f"--{name} {format_value(value)}"
        + (f", the recipe has {format_value(recipe[name])}" if recipe.get(name, value) != value else "")
        for name, value in given.items()
    )


def format_value(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def describe_cost(plan: Plan) -> str:
    if plan.fit is None or plan.fit.choice.chosen is None or plan.duration is None:
        return "an unknown time: the first steps tell"
    chosen, gpu = plan.fit.choice.chosen, plan.fit.choice.gpu
    parts = sorted(plan.duration.parts.items(), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts[:NUM_PARTS] if seconds >= 1)
    time = duration(plan.duration.seconds) + (f" ({largest})" if largest else "")
    if find_device().type != "cuda":
        return f"about {time}; there is no NVIDIA or AMD GPU, which would be many times faster"
    memory = f"{format_gib(chosen.device_bytes)} of {format_gib(gpu.memory_bytes)}"
    return f"about {time} and {memory} of the GPU, spared by {describe(chosen.mode)}"
