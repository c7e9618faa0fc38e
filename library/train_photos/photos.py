"""The photos of a run: their folders and captions, and the trigger word that calls them."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from library.base.errors import about, of_file
from library.base.suggestions import did_you_mean, nearby
from library.data.description.image_extensions import image_extensions, list_unread, plugin_for
from library.data.plan.audit_pixels import PixelMeasures, measure_pixels
from library.data.sources.folders.listing import list_files
from library.data.sources.folders.reading import read_caption

CAPTION_EXTENSIONS = (".txt", ".caption")
REPEATED = re.compile(r"(\d+)_(.+)")  # sd-scripts' name of a folder: how often each image is drawn, and its caption
UNWANTED = re.compile(r"_*(rejects?|rejected|bad|trash|deleted?|discarded|unused|not used|old|backups?|duplicates)_*")
USUAL_SIDE = 1024
SMALLEST = 1 / 4  # of the training side; enlarged four times, a photo teaches blur alone


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
class Photo:
    """A photo that can be opened."""

    path: Path
    caption: str  # the first line of its text file; "" if it has none
    digest: str  # of its file
    measures: PixelMeasures

    @property
    def side(self) -> float:
        """The side of a square with as many pixels."""
        width, height = self.measures.size
        return float((width * height) ** 0.5)


@dataclass(frozen=True)
class PhotoFolder:
    """A folder with photos directly in it."""

    path: Path
    photos: tuple[Photo, ...]
    left_out: tuple[tuple[Path, str], ...]  # with the reason
    caption_extension: str
    metadata_file: str = ""  # with the photos and captions that were chosen, instead of the files beside them

    @property
    def name(self) -> str:
        """The folder's name without the repeats."""
        return split_name(self.path.name)[1]

    @property
    def num_repeats(self) -> int:
        """The repeats in the folder's name."""
        return split_name(self.path.name)[0]

    @property
    def captions(self) -> list[str]:
        return [photo.caption for photo in self.photos if photo.caption]

    @property
    def digest(self) -> str:
        """A digest of the photos, with their names."""
        return digest_texts(f"{photo.path.name} {photo.digest}" for photo in self.photos)

    @property
    def own_words(self) -> str:
        """The words of a folder named as sd-scripts', `10_sks cat`; "" for others."""
        return self.name if REPEATED.fullmatch(self.path.name) else ""

    @property
    def is_unwanted(self) -> bool:
        """True for a folder whose name says that its photos are not meant for training."""
        return UNWANTED.fullmatch(self.path.name.lower()) is not None

    def describe_uncaptioned(self, trigger: Trigger) -> str:
        """Return the caption of photos without one: what the user gave wins over the folder's words."""
        return trigger.text if trigger.is_given else self.own_words or trigger.text

    def describe(self, trigger: Trigger, num_repeats: int = 1) -> dict[str, Any]:
        """Return the folder as a subset of a dataset file; `num_repeats` multiplies those of its name."""
        endings = image_extensions()
        excluded = sorted(path.name for path, _ in self.left_out if path.name.endswith(endings))
        if self.metadata_file:
            chosen, excluded = {"metadata_file": self.metadata_file}, []
        else:
            chosen = {
                "class_tokens": self.describe_uncaptioned(trigger), "caption_extension": self.caption_extension
            }  # fmt: skip
        return {
            "image_dir": str(self.path),
            **chosen,
            "num_repeats": num_repeats * self.num_repeats,
            "trigger_word": trigger.word,
            **({"exclude": excluded} if excluded else {}),
        }

    def without(self, reasons: Mapping[Path, str]) -> "PhotoFolder":
        """Return the folder without these photos."""
        left_out = [(photo.path, reasons[photo.path]) for photo in self.photos if photo.path in reasons]
        photos = tuple(photo for photo in self.photos if photo.path not in reasons)
        return replace(self, photos=photos, left_out=(*self.left_out, *left_out))


def choose(folder: PhotoFolder, captions: Mapping[Path, str], metadata_file: str) -> PhotoFolder:
    """Return a folder with only some of its photos and with these captions, which `metadata_file` is to hold."""
    chosen = (replace(one, caption=captions[one.path]) for one in folder.photos if one.path in captions)
    return replace(folder, photos=tuple(chosen), metadata_file=metadata_file)


def format_metadata(captions: Mapping[Path, str], uncaptioned: str) -> str:
    """Return the lines of a metadata file; photos without a caption get `uncaptioned`."""
    entries = ({"image_path": str(photo), "caption": text or uncaptioned} for photo, text in captions.items())
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def find_photos(root: Path, side: int = USUAL_SIDE, on_photo: Callable[[], object] = lambda: None) -> list[PhotoFolder]:
    """Find the photos in a folder and the folders below it, and measure them as they are trained at this side; hidden
    folders are left out. `on_photo` is called after each.

    Raises UserError if there are none.
    """
    if not root.is_dir():
        raise of_file(root)(f"is no folder{nearby(root, is_folder=True)}", "give the folder that your photos are in")
    paths = []
    for path, names, _ in os.walk(root.absolute()):
        names[:] = sorted(name for name in names if not name.startswith("."))
        paths.append(Path(path))
    folders = [folder for path in paths if (folder := open_folder(path, side, on_photo)).photos or folder.left_out]
    if not any(folder.photos for folder in folders):
        reasons = "".join(f"; {file.name} {reason}" for f in folders for file, reason in f.left_out[:1])
        raise of_file(root)(f"has no photos that can be read{reasons}")
    return folders


def open_folder(path: Path, side: int, on_photo: Callable[[], object]) -> PhotoFolder:
    """Open the photos directly in a folder."""
    listed = {extension: list_files(str(path), extension) for extension in CAPTION_EXTENSIONS}
    extension = max(listed, key=lambda ending: len(listed[ending].captions))
    files = listed[extension]
    with ThreadPoolExecutor() as threads:
        found = []
        for photo in threads.map(partial(open_photo, extension=extension, side=side), map(path.joinpath, files.images)):
            found.append(photo)
            on_photo()
    left_out = [(p.path, f"cannot be read ({p.measures.problem})") for p in found if p.measures.problem is not None]
    for name in list_unread(files.aside):
        plugin = plugin_for(name)
        left_out.append((path / name, f"needs {plugin}" if plugin else "unsupported: convert it to .png or .jpg"))
    return PhotoFolder(path, tuple(p for p in found if p.measures.problem is None), tuple(left_out), extension)


def open_photo(path: Path, extension: str, side: int) -> Photo:
    """Decode a photo, because only that shows damage, and read its caption."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return Photo(path, "", "", PixelMeasures(str(path), problem=str(error.strerror)))
    text = path.with_suffix(extension)
    caption = str(read_caption(str(text))[1]).partition("\n")[0] if text.is_file() else ""
    return Photo(path, caption, digest_texts([content]), measure_pixels(str(path), (side, side), content))


def select_photos(
    root: Path, folders: Sequence[PhotoFolder], side: int, unwanted: Sequence[str], keeps_all: bool
) -> list[PhotoFolder]:
    """Leave out the photos that the user names, and unless all are kept, copies and those too small for the training.

    Raises UserError for a name that no photo has, and if none is left.
    """
    reasons = dict.fromkeys((path for name in unwanted for path in find_named(root, folders, name)), "as asked")
    first_by_digest: dict[str, Photo] = {}
    # Of two copies, one that has a caption stays.
    for photo in sorted((photo for f in folders for photo in f.photos), key=lambda photo: not photo.caption):
        if photo.path in reasons or keeps_all:
            continue
        if photo.side < side * SMALLEST:
            reasons[photo.path] = f"below a quarter of {side} px"
        elif first_by_digest.setdefault(photo.digest, photo) is not photo:
            reasons[photo.path] = "the same file as another"
    selected = [folder.without(reasons) for folder in folders]
    if not any(folder.photos for folder in selected):
        why = "; ".join(sorted(set(reasons.values())))
        raise of_file(root)(f"has no photo that is not left out ({why}); --keep_all trains on small ones")
    return selected


def find_named(root: Path, folders: Sequence[PhotoFolder], name: str) -> list[Path]:
    """Return the photos that a name or a path means, also as a folder. Raises UserError if there are none."""
    known = [path for f in folders for path in (*(p.path for p in f.photos), *(path for path, _ in f.left_out))]
    places = {Path(os.path.abspath(path)) for path in (name, root / name)}
    found = [path for path in known if path.name == name or not places.isdisjoint((path, *path.parents))]
    if not found:
        hint = did_you_mean(name, [path.name for path in known])
        raise about("--leave_out")(f": no photo in {root} is named {name}{hint}")
    return found


def digest_texts(texts: Iterable[str | bytes]) -> str:
    """Return a short digest of texts in their order."""
    encoded = (text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass") for text in texts)
    return blake2b(b"\0".join(encoded), digest_size=8).hexdigest()


def split_name(name: str) -> tuple[int, str]:
    """Return the repeats of a folder's name and the rest; 1 for a name without."""
    match = REPEATED.fullmatch(name)
    return (max(1, int(match[1])), match[2].strip()) if match else (1, name)


def parse_trigger(text: str) -> Trigger:
    """Parse "mycat, a cat". Raises UserError for a text without a word."""
    word, _, subject = (part.strip() for part in text.partition(","))
    if not word:
        raise about("--trigger")(f"{text!r} has no word", 'write one that the base does not know, as in "mycat, a cat"')
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
