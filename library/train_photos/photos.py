"""The photos of a run: their folders and captions, and the trigger word that calls them."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from statistics import median
from typing import Any

from library.base.errors import UserError, reason_of
from library.base.suggestions import nearby
from library.data.decoding.images import read_pixels
from library.data.description.captions import has_word
from library.data.description.image_extensions import list_unread, plugin_for
from library.data.sources.folders.listing import list_files
from library.data.sources.folders.reading import read_caption

CAPTION_EXTENSIONS = (".txt", ".caption")
REPEATED = re.compile(r"(\d+)_(.+)")  # sd-scripts' name of a folder: how often each image is drawn, and its caption


@dataclass(frozen=True)
class Trigger:
    """The word that calls what is trained, and what that is."""

    word: str
    subject: str = ""  # "a cat"; "" if unknown
    is_given: bool = False  # by the user

    @property
    def text(self) -> str:
        return ", ".join(filter(None, (self.word, self.subject)))


@dataclass(frozen=True)
class PhotoFolder:
    """A folder with photos directly in it."""

    path: Path
    photos: tuple[Path, ...]  # that can be opened
    left_out: tuple[tuple[Path, str], ...]  # with the reason
    captions: tuple[str, ...]  # of photos that have one
    caption_extension: str
    num_repeats: int
    name: str  # without the repeats
    median_side: float  # of a square as large as a photo, in pixels
    digest: str  # of the photos, with their names
    metadata_file: str = ""  # with the photos and captions that were chosen, instead of the files beside them

    @property
    def own_words(self) -> str:
        """The words of a folder named as sd-scripts', `10_sks cat`; "" for others."""
        return self.name if REPEATED.fullmatch(self.path.name) else ""

    def describe_uncaptioned(self, trigger: Trigger) -> str:
        """Return the caption of photos without one: what the user gave wins over the folder's words."""
        return trigger.text if trigger.is_given else self.own_words or trigger.text

    def describe(self, trigger: Trigger) -> dict[str, Any]:
        """Return the folder as a subset of a dataset file."""
        captions = {
            "class_tokens": self.describe_uncaptioned(trigger),
            "caption_extension": self.caption_extension,
        }
        return {
            "image_dir": str(self.path),
            **({"metadata_file": self.metadata_file} if self.metadata_file else captions),
            "num_repeats": self.num_repeats,
            "trigger_word": trigger.word,
        }

    def count_naming(self, trigger: Trigger) -> int:
        """Count the captions that have the trigger word."""
        return sum(has_word(caption, trigger.word) for caption in self.captions)


def find_photos(root: Path) -> list[PhotoFolder]:
    """Find the photos in a folder and the folders below it; hidden folders are left out.

    Raises UserError if there are none.
    """
    if not root.is_dir():
        raise UserError.of_file(
            root, f"is no folder{nearby(root, is_folder=True)}; give the folder that your photos are in"
        )
    paths = []
    for path, names, _ in os.walk(root.absolute()):
        names[:] = sorted(name for name in names if not name.startswith("."))
        paths.append(Path(path))
    folders = [folder for path in paths if (folder := open_folder(path)) is not None]
    if not any(folder.photos for folder in folders):
        reasons = "".join(f"; {file.name} {reason}" for f in folders for file, reason in f.left_out[:1])
        raise UserError.of_file(root, f"has no photos that can be read{reasons}")
    return folders


def open_folder(path: Path) -> PhotoFolder | None:
    """Open the photos directly in a folder; None if it has none."""
    listed = {extension: list_files(str(path), extension) for extension in CAPTION_EXTENSIONS}
    extension = max(listed, key=lambda ending: len(listed[ending].captions))
    files = listed[extension]
    all_photos = [path / name for name in files.images]
    with ThreadPoolExecutor() as threads:
        found = dict(zip(all_photos, threads.map(decode, all_photos), strict=True))
    left_out = [(file, reason) for file, reason in found.items() if isinstance(reason, str)]
    for name in list_unread(files.aside):
        plugin = plugin_for(name)
        left_out.append((path / name, f"needs {plugin}" if plugin else "unsupported: convert it to .png or .jpg"))
    if not found and not left_out:
        return None
    opened = {file: photo for file, photo in found.items() if not isinstance(photo, str)}
    photos = tuple(opened)
    repeats, name = split_name(path.name)
    captions = tuple(text for file in photos if (text := read_own_caption(file, extension)))
    side = median(side for side, _ in opened.values()) if opened else 0.0
    digest = digest_texts(f"{file.name} {content}" for file, (_, content) in opened.items())
    return PhotoFolder(path, photos, tuple(left_out), captions, extension, repeats, name, side, digest)


def read_own_caption(photo: Path, extension: str) -> str:
    """Return the caption in the file beside a photo; "" without one."""
    file = photo.with_suffix(extension)
    return read_caption(str(file))[1].partition("\n")[0] if file.is_file() else ""


def choose(folder: PhotoFolder, captions: Mapping[Path, str], metadata_file: str) -> PhotoFolder:
    """Return a folder with only some of its photos and with these captions, which `metadata_file` is to hold."""
    given = tuple(caption for caption in captions.values() if caption)
    digest = folder.digest
    if len(captions) < len(folder.photos):
        digest = digest_texts([digest, *(photo.name for photo in captions)])
    return replace(folder, photos=tuple(captions), captions=given, digest=digest, metadata_file=metadata_file)


def format_metadata(captions: Mapping[Path, str], uncaptioned: str) -> str:
    """Return the lines of a metadata file; photos without a caption get `uncaptioned`."""
    entries = ({"image_path": str(photo), "caption": text or uncaptioned} for photo, text in captions.items())
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def digest_texts(texts: Iterable[str]) -> str:
    """Return a short digest of texts in their order."""
    return blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def decode(path: Path) -> tuple[float, str] | str:
    """Return the side of a square with as many pixels as a photo and a digest of its file, or why it cannot be trained
    on: only decoding shows damage."""
    try:
        content = path.read_bytes()
        pixels, _ = read_pixels(str(path), content)
    except (UserError, OSError) as error:
        return f"cannot be read ({reason_of(error) or 'damaged'})"
    return float((pixels.shape[0] * pixels.shape[1]) ** 0.5), blake2b(content, digest_size=8).hexdigest()


def split_name(name: str) -> tuple[int, str]:
    """Return the repeats of a folder's name and the rest; 1 for a name without."""
    match = REPEATED.fullmatch(name)
    return (max(1, int(match[1])), match[2].strip()) if match else (1, name)


def parse_trigger(text: str) -> Trigger:
    """Parse "mycat, a cat". Raises UserError for a text without a word."""
    word, _, subject = (part.strip() for part in text.partition(","))
    if not word:
        raise UserError.about(
            "--trigger", f'{text!r} has no word; write one that the base does not know, as in "mycat, a cat"'
        )
    return Trigger(word, subject, is_given=True)


def suggest_trigger(root: Path, folders: Sequence[PhotoFolder]) -> Trigger:
    """Return the trigger that a folder's name gives: both words of "10_mycat cat", else its letters and digits."""
    repeated = [folder for folder in folders if REPEATED.fullmatch(folder.path.name)]
    if len(repeated) == 1:
        word, _, subject = repeated[0].name.partition(" ")
        return Trigger(clean(word), subject)
    return Trigger(clean(split_name(root.absolute().name)[1]))


def clean(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower() or "subject"
