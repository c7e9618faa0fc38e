"""File name extensions of images, including formats that Pillow reads with an installed plug-in."""

from PIL import Image

EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp")
PLUGINS = {"avif": "pillow_avif", "jxl": "pillow_jxl"}


def image_extensions() -> tuple[str, ...]:
    """Return the extensions of image files, with dot, in lower and upper case, including those of plug-ins."""
    names = [*EXTENSIONS, *(extension for extension in PLUGINS if load_plugin(extension))]
    # As in sd-scripts, .jpg and .JPG are images and .Jpg is not. The audit names files of such extensions.
    return tuple(f".{extension}" for extension in names) + tuple(f".{extension.upper()}" for extension in names)


def load_plugin(extension: str) -> bool:
    """Register Pillow's plug-in for this extension. Return True if Pillow can read such files now."""
    # Recent versions of Pillow read AVIF without a plug-in.
    if f".{extension}" in Image.registered_extensions():
        return True
    module = PLUGINS.get(extension)
    if module is None:
        return False
    try:
        __import__(module)
    except ImportError:
        return False
    return True
