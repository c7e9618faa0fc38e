"""Pack the committed files into archives of a release, with their SHA-256 sums. Needs only Python and git."""

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NEEDS_PACKAGES = False  # read by library/environment/requirements.py
ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(ROOT))

from library.base.command_parser import make_parser  # noqa: E402
from library.base.error_lines import fail  # noqa: E402
from library.base.errors import UserError, of_file  # noqa: E402
from library.base.terminal import print_line  # noqa: E402
from library.base.version import NAME, VERSION  # noqa: E402

FORMATS = ("tar.gz", "zip")
SUMS = "SHA256SUMS"
EXAMPLES = """\
  python3 tools/release.py dist
  cd dist && sha256sum --check SHA256SUMS"""


def setup_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, EXAMPLES)
    parser.add_argument("output_dir", type=Path, help="folder for the archives; it must not exist")
    return parser


def git(*words: str) -> bytes:
    """Return what git prints in the repository. Raises UserError with git's message if it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True)
    if done.returncode != 0:
        raise UserError(f"git {words[0]} failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def pack(folder: Path) -> None:
    """Write the archives of the current commit and their sums. Raises UserError for uncommitted changes."""
    if folder.exists():
        raise of_file(folder, cause="would be lost")("exists", "name a new folder")
    if changed := git("status", "--porcelain", "--untracked-files=no").decode():
        raise UserError(f"`git commit` these changes first, the release would lack them:\n{changed.rstrip()}")
    name = f"{NAME}-{VERSION}"
    archives = {f"{name}.{form}": git("archive", f"--format={form}", f"--prefix={name}/", "HEAD") for form in FORMATS}
    folder.mkdir(parents=True)
    for file, content in archives.items():
        (folder / file).write_bytes(content)
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {file}\n" for file, content in archives.items())
    (folder / SUMS).write_text(sums, encoding="utf-8")
    print_line(f"{folder}: {', '.join([*archives, SUMS])}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0 success, 1 user error."""
    args = setup_parser().parse_args(argv)
    try:
        pack(args.output_dir)
    except UserError as error:
        return fail(error, argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
