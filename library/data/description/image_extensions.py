"""File name extensions of images, including formats that Pillow reads with an installed plug-in."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from PIL import Image

from library.base.errors import list_few
from library.environment.packages import is_missing
from library.environment.requirements import quote

EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp")
# Formats whose files may have the same size whatever they show.
UNCOMPRESSED = frozenset(("bmp", "dib", "tif", "tiff", "tga", "psd", "ppm", "pgm", "pbm", "pnm"))
OTHER_IMAGES = frozenset(("gif", "tif", "tiff", "heic", "heif", "hif", "avif", "jxl", "tga", "psd"))
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@dataclass(frozen=True)
class Plugin:
    """A package that lets Pillow read a format; importing `module` registers it."""

    module: str
    package: str

    def __str__(self) -> str:
        pip = f"{quote(sys.executable)} -m pip install"
        if is_missing(self.module):
            return f"{self.package} ({pip} {self.package})"
        return f"{self.package}, which is installed and cannot be imported ({pip} --upgrade {self.package})"


HEIF = Plugin("pillow_heif.HeifImagePlugin", "pillow-heif")
# Recent versions of Pillow read AVIF without a plug-in.
PLUGINS: Mapping[str, Plugin] = {
    "avif": Plugin("pillow_avif", "pillow-avif-plugin"),
    "jxl": Plugin("pillow_jxl", "pillow-jxl-plugin"),
    "heic": HEIF,
    "heif": HEIF,
    "hif": HEIF,
}


def image_extensions() -> tuple[str, ...]:
    """Return the extensions of image files, with dot, in lower and upper case, including those of plug-ins."""
    names = [*EXTENSIONS, *(extension for extension in PLUGINS if load_plugin(extension))]
    # As in sd-scripts, .jpg and .JPG are images and .Jpg is not. The audit names files of such extensions.
    return tuple(f".{extension}" for extension in names) + tuple(f".{extension.upper()}" for extension in names)


def is_uncompressed(name: str) -> bool:
    """Return True if the format of a file of this name does not compress, or need not."""
    return name.rpartition(".")[2].lower() in UNCOMPRESSED


def load_plugin(extension: str) -> bool:
    """Register Pillow's plug-in for this extension. Return True if Pillow can read such files now."""
    if f".{extension}" in Image.registered_extensions():
        return True
    plugin = PLUGINS.get(extension)
    if plugin is None:
        return False
    try:
        __import__(plugin.module)
    except Exception:  # missing or broken
        return False
    return True


def plugin_for(name: str, head: bytes = b"") -> Plugin | None:
    """Return the plug-in that Pillow lacks for a file of this name, or with these first 12 bytes; None if it lacks
    none."""
    is_heif = head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS  # phones' images renamed to .jpg
    extension = "heic" if is_heif else name.rpartition(".")[2].lower()
    return None if load_plugin(extension) else PLUGINS.get(extension)


def list_unread(names: Iterable[str]) -> list[str]:
    """Return the names of images among files that are not read, sorted."""
    return sorted(name for name in names if name.rpartition(".")[2].lower() in OTHER_IMAGES.union(EXTENSIONS))


def group_unread(names: Iterable[str]) -> dict[str, list[str]]:
    """Group images that are not read by the reason and what to do."""
    groups: dict[str, list[str]] = {}
    for name in names:
        plugin = plugin_for(name)
        unsupported = "have unsupported extensions; convert or rename them to .png or .jpg"
        groups.setdefault(unsupported if plugin is None else f"are left out: they require {plugin}", []).append(name)
    return groups


def describe_unread(names: Iterable[str]) -> str:
    """Return a remark on the images among files that are not read, or ""."""
    groups = group_unread(list_unread(names))
    return "".join(f"; {len(images)} images {effect}: {list_few(images, 3)}" for effect, images in groups.items())
