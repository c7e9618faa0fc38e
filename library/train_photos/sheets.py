"""The sheets at the end of a run, of the last files at one strength and of the file to use at several, and what they
show."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path

from PIL import Image

from library.base.formatting import format_count
from library.checkpoints.marks import mark_of, save_image
from library.data.decoding.images import read_pixels
from library.options.output.prompts import read_prompts
from library.train_photos.base import Base
from library.train_photos.plan import NUM_SHEET_FILES, Files, read_options
from library.training.evaluation.image_scores import NEAR_COPIES, build_scorer, measure_change
from library.training.evaluation.prompts import resolve_all
from library.training.offline.contact_sheet import Row, arrange, draw_rows
from library.training.saving.saved_files import drop_copies, files_of_run, read_num_steps
from tools.contact_sheet import expand_columns, find_device
from tools.draw import SHEET

WRITER = "train.py"
STRENGTHS = (0.0, 0.5, 0.75, 1.0)
FILES_SHEET = "files.png"
SIDE = 512  # pixels of an image in a sheet
MOST_COMPARED = 500  # photos
# Means of rank correlations over five seeds, by `python -m benchmarks.toys evidence scores`.
WORTH = (
    "hints, not measurements: on the toy world near-copies rank files as a checker of the images does to 75 %, and how "
    "little images change to 93 %; near-copies of real photos mean that the file repeats them"
)


@dataclass(frozen=True)
class Sheets:
    """The sheets, as files and as images by title, that of files first, and what that one shows."""

    strengths: Path
    files: Path
    images: Mapping[str, Image.Image]
    seen: str


def draw_sheets(base: Base, photos: Sequence[Path], files: Files, adapter: Path) -> Sheets:
    """Draw the sheets of a run that was trained on these photos, for the first folder without them.

    Raises UserError for files that do not fit.
    """
    options = read_options(base, files)
    arch = base.spec.build(options)
    prompts = expand_columns(resolve_all(read_prompts(files.prompts), arch), None)
    last = drop_copies(files_of_run(files.names))[-NUM_SHEET_FILES:]
    wanted = list(dict.fromkeys([*((file, 1.0) for file in last), *((adapter, strength) for strength in STRENGTHS)]))
    rows = [Row([pair] if pair[1] else [], prompts) for pair in wanted]
    drawn_rows = draw_rows(options.network, options.precision, options.memory, arch, rows, find_device())
    drawn = dict(zip(wanted, drawn_rows, strict=True))
    names = (f"{files.name}-strengths{'' if number == 1 else f'-{number}'}" for number in count(1))
    folder = next(path for name in names if not ((path := files.folder / name) / SHEET).exists())
    columns = [f"{prompt.seed}: {prompt.text}" for prompt in prompts]
    labels = [f"step {read_num_steps(file)}: {file.name}" for file in last]
    of_files = arrange([drawn[file, 1.0] for file in last], labels, columns, SIDE)
    strengths = [f"strength {strength:g}" for strength in STRENGTHS]
    of_strengths = arrange([drawn[adapter, s] for s in STRENGTHS], strengths, columns, SIDE)
    images = {f"The last {format_count(len(last), 'file')} at strength 1": of_files, adapter.name: of_strengths}
    seen = describe_seen(photos, [drawn[file, 1.0] for file in last])
    return Sheets(folder / SHEET, folder / FILES_SHEET, images, seen)


def save_sheets(sheets: Sheets) -> None:
    """Save the sheets; with that of strengths, which comes last, the run is finished."""
    for path, image in zip((sheets.files, sheets.strengths), sheets.images.values(), strict=True):
        save_image(path, image, mark_of(WRITER, path))


def describe_seen(photos: Sequence[Path], rows: Sequence[Sequence[Image.Image]]) -> str:
    """Return what the images of successive files show, and how much that is worth."""
    scorer = build_scorer(read_photos(photos))
    copies = [int(sum(scorer.score(images, [])[NEAR_COPIES])) for images in rows]
    changes = [measure_change(before, after) for before, after in pairwise(rows)]
    text = f"of {len(rows[0])} images a file, near-copies of photos are {', '.join(map(str, copies))}"
    if changes:
        text += f"; from file to file they change by {', '.join(f'{change:.1%}' for change in changes)}"
    return f"{text} ({WORTH})"


def read_photos(photos: Sequence[Path]) -> Iterator[Image.Image]:
    """Yield the photos, or of many some that are spread evenly."""
    for photo in photos[:: -(-len(photos) // MOST_COMPARED)]:
        pixels, _ = read_pixels(str(photo))
        yield Image.fromarray(pixels)
