"""Pictures of the page for docs/page.md: `python3 -m tests.page.pictures docs/images`."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from tests.chromium import browsing
from tests.page.serving import serving
from tests.page.test_looks import fill

VIEWS = ("photos", "history")
SIZE = (1100, 760)
SHOWN = 880  # pixels, the width in the docs
SEEN = "(one) => one.getBoundingClientRect().top < innerHeight"
MOST_BYTES = 150_000


def save_pictures(
    folder: Path, size: tuple[int, int] = SIZE, shown: int = SHOWN, dark: bool = False, ending: str = ""
) -> None:
    """Write a picture of each view, `shown` pixels wide, into a folder."""
    with TemporaryDirectory() as scratch:
        views = fill(Path(scratch))
        with serving(Path(scratch)) as server, browsing(Path(scratch)) as browser:
            browser.open(server.address.first_url).see("Train a LoRA on your photos")
            for name in VIEWS:
                tab = browser.open(server.address.url + views[name], *size, dark=dark)
                tab.when("return document.querySelector('h1') && document.querySelector('.list li, .grid li, dl.plan')")
                tab.run(f"Promise.all([...document.images].filter({SEEN}).map((one) => one.decode()))")
                path = folder / f"page_{name}{ending}.png"
                tab.picture(path)
                tab.call("Page.close")  # browsers keep few connections to a server
                with Image.open(path) as image:
                    small = image.convert("RGB").resize(
                        (shown, shown * image.height // image.width), Image.Resampling.LANCZOS
                    )
                small.save(path.with_suffix(".webp"), quality=80)
                path.unlink()
                assert path.with_suffix(".webp").stat().st_size <= MOST_BYTES, path


if __name__ == "__main__":
    save_pictures(Path(sys.argv[1]))
