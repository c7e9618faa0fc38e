"""Settings of another trainer that decide together, once all of them are known."""

import re
from collections.abc import Mapping
from typing import Any

from library.options.training.run import MAX_SEED
from library.translation.draft import Draft, Line, is_off, to_word

CONSTANT = "constant"
EIGHT_BIT = "AdamW8bit"
LARGEST_BUCKET = 2  # sides of the resolution: other trainers have no limit
SMALLEST_BUCKET = 0.5
PROMPT_KEYS = ("prompt", "positive")


def finish(draft: Draft) -> None:
    """Complete the options of a draft."""
    choose_optimizer(draft)
    choose_warmup(draft)
    choose_saves(draft)
    choose_buckets(draft)
    if "train_inpainting" in draft.options:  # each image gets a mask in each draw
        forget_weak(draft, "cache_latents_to_disk")
    if not ("network_train_unet_only" in draft.options and draft.options["network_train_unet_only"].value):
        # A text encoder that is trained cannot be cached.
        forget_weak(draft, "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk")
    if draft.arguments:
        words = [f"{name}={to_word(line.value)}" for name, line in draft.arguments.items()]
        add_words(draft, "network_args", words, draft.arguments)
    if draft.optimizer:
        words = [f"{name}={','.join(map(str, line.value)) if isinstance(line.value, list) else line.value}"
                 for name, line in draft.optimizer.items()]  # fmt: skip
        add_words(draft, "optimizer_args", words, draft.optimizer)


def forget_weak(draft: Draft, *names: str) -> None:
    """Drop options that are defaults."""
    for name in names:
        if name in draft.options and draft.options[name].is_weak:
            del draft.options[name]


def add_words(draft: Draft, name: str, words: list[str], lines: Mapping[str, Line]) -> None:
    """Add name=value words to an option, behind those that the file has; of one name the file's own counts."""
    given = draft.options.get(name)
    earlier = [] if given is None else list(given.value)
    named = {word.partition("=")[0] for word in earlier}
    origins = tuple(dict.fromkeys(origin for line in lines.values() for origin in line.origins))
    own = [word for word in words if word.partition("=")[0] not in named]
    draft.options[name] = Line([*earlier, *own], (*(given.origins if given else ()), *origins))


def choose_optimizer(draft: Draft) -> None:
    """Merge diffusers' switch for 8 bits with the name of the optimizer: it acts on AdamW alone."""
    switch, name = draft.options.get("use_8bit_adam"), draft.options.get("optimizer_type")
    if switch is None or draft.program.key != "diffusers":
        return
    del draft.options["use_8bit_adam"]
    if name is None or name.value == "AdamW":
        origins = (*switch.origins, *(() if name is None or name.is_weak else name.origins))
        draft.options["optimizer_type"] = Line(EIGHT_BIT, origins)


def choose_warmup(draft: Draft) -> None:
    """Give a constant rate the warmup that OneTrainer gives it; elsewhere a constant rate has none."""
    scheduler, warmup = draft.options.get("lr_scheduler"), draft.options.get("lr_warmup_steps")
    if warmup is None or (scheduler is not None and scheduler.value != CONSTANT):
        return
    if draft.program.warms_constant:
        origins = warmup.origins if scheduler is None else (*scheduler.origins, *warmup.origins)
        draft.options["lr_scheduler"] = Line(f"{CONSTANT}_with_warmup", origins)
    elif draft.program.key not in ("sd_scripts", "musubi_tuner", "kohya_ss", "lora_easy"):
        del draft.options["lr_warmup_steps"]


def choose_saves(draft: Draft) -> None:
    """Turn a number of kept files into steps."""
    for name, line in draft.kept.items():
        every = draft.options.get("save_every_n_steps")
        option, count = (name, every) if every is not None else (
            name.replace("steps", "epochs"), draft.options.get("save_every_n_epochs")
        )  # fmt: skip
        if count is not None and str(count.value).isdigit():
            value = line.value * int(count.value)
            draft.options[option] = Line(value, (*line.origins, *count.origins))


def choose_buckets(draft: Draft) -> None:
    """Take the limits off the buckets' sides for trainers that have none."""
    if draft.program.has_bucket_limits:
        return
    sides = [side for table in (draft.general, *draft.subsets.values()) if "resolution" in table
             for side in as_list(table["resolution"].value)]  # fmt: skip
    if not sides and "resolution" in draft.options:
        sides = [int(side) for side in re.findall(r"\d+", str(draft.options["resolution"].value))]
    if sides and all(isinstance(side, int) for side in sides):
        origin = (f"{draft.program.title} has no limit",)
        draft.put(draft.options, "max_bucket_reso", Line(LARGEST_BUCKET * max(sides), origin, is_weak=True))
        low = max(64, int(min(sides) * SMALLEST_BUCKET) // 64 * 64)
        draft.put(draft.options, "min_bucket_reso", Line(min(low, 256), origin, is_weak=True))


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def split_resolutions(draft: Draft) -> tuple[Mapping[str, Any], ...]:
    """Return the datasets: for each set of images one, or one for each of its resolutions."""
    datasets = list[Mapping[str, Any]]()
    if not draft.subsets and draft.general:
        draft.subsets[0] = {}
    for number in sorted(draft.subsets):
        keys = {**draft.general, **draft.subsets[number]}
        if not keys.keys() & {"image_dir", "metadata_file", "dataset_name"}:
            keys["image_dir"] = Line("", ("write your folder of images here",))
        if "dataset_name" in keys and "class_tokens" in keys and "caption_column" not in keys:
            keys["caption_column"] = Line("", keys["class_tokens"].origins)  # one caption for all images
        for side in as_list(keys["resolution"].value) if "resolution" in keys else [None]:
            sized = {} if side is None else {"resolution": Line(side, keys["resolution"].origins)}
            datasets.append({**keys, **sized})
    return tuple(datasets)


def render_prompts(draft: Draft) -> tuple[str, ...]:
    """Return the lines of a prompts file."""
    tables = (draft.general, *draft.subsets.values())
    trigger = next((table["trigger_word"].value for table in tables if "trigger_word" in table), "")
    lines = []
    for number, prompt in enumerate(draft.prompts):
        own = dict(draft.letters)
        text = prompt
        if isinstance(prompt, dict):
            text = next((prompt[key] for key in PROMPT_KEYS if key in prompt), "")
            letters = draft.program.read_prompt(prompt, draft.script)
            if "walk_seed" in draft.options and isinstance(letters.get("d"), int):
                letters["d"] = (letters["d"] - number) % (MAX_SEED + 1)  # a prompt's own seed does not walk there
            own |= letters
        words = [f"--{letter} {value}" for letter, value in own.items() if not is_off(value)]
        lines.append(" ".join([str(text).replace("[trigger]", str(trigger)).replace("\n", " "), *words]))
    return tuple(lines)
