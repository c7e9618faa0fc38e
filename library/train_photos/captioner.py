"""Captions for photos that have none, by Florence-2."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from library.base.atomic_files import atomic_path
from library.base.errors import about
from library.data.decoding.images import read_pixels
from library.train_photos.photos import PhotoFolder
from library.training.reporting.console_lines import announce
from tools.contact_sheet import find_device

MODEL = "florence-community/Florence-2-base"
DESCRIPTION = "Florence-2 base (0.5 GB, MIT licence)"
TASK = "<DETAILED_CAPTION>"
MOST_TOKENS = 96


def write_captions(folders: Sequence[PhotoFolder], model_name: str = MODEL) -> int:
    """Write a caption beside every photo that has none. Return how many were written.

    Raises UserError if the captioner can neither be loaded nor downloaded.
    """
    targets = {
        photo.path: target
        for folder in folders
        for photo in folder.photos
        if not (target := photo.path.with_suffix(folder.caption_extension)).exists()
    }
    num_written = 0
    for photo, caption in describe_photos(list(targets), model_name):
        with atomic_path(targets[photo]) as unfinished:
            unfinished.write_text(caption + "\n", encoding="utf-8")
        num_written += 1
        announce(f"{targets[photo].name}: {caption}")
    return num_written


def describe_photos(photos: Sequence[Path], model_name: str = MODEL) -> Iterator[tuple[Path, str]]:
    """Yield the photos with a caption for each; those for which none is found are left out.

    Raises UserError if the captioner can neither be loaded nor downloaded.
    """
    if not photos:
        return
    announce(f"captions by {DESCRIPTION}, of {model_name}")
    model, processor = load_captioner(model_name)
    for photo in photos:
        pixels, _ = read_pixels(str(photo), photo.read_bytes())
        caption = describe_image(model, processor, Image.fromarray(pixels))
        if caption:
            yield photo, caption
        else:  # an empty file would train the photo without the trigger
            announce(f"{photo.name}: no caption was found")


def load_captioner(name: str) -> tuple[Any, Any]:
    """Return (model, processor) of a folder or a name on the hub, where it is downloaded from."""
    from transformers import AutoProcessor, Florence2ForConditionalGeneration

    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        model = Florence2ForConditionalGeneration.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise about("--caption", cause="unreadable")(
            f": {name} cannot be loaded ({reason})", "write the captions yourself, or leave out --caption"
        ) from None
    return model.to(find_device()).eval(), processor


@torch.no_grad()
def describe_image(model: Any, processor: Any, image: Image.Image) -> str:
    """Return a sentence or two about an image."""
    inputs = processor(text=TASK, images=image, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=MOST_TOKENS, num_beams=1, do_sample=False)
    text = processor.batch_decode(tokens, skip_special_tokens=True)[0]
    return " ".join(text.split()).removeprefix("The image shows ")
