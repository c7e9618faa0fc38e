"""The tables of benchmarks/RESULTS.md that programs write, each between two marks with its name."""

from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parent / "RESULTS.md"
LAST_SECTION = "\n## Not measured yet"


def put_into(page: str, name: str, lines: Sequence[str], title: str = "") -> str:
    """Return the page with the table `name` replaced by `lines`; a new one becomes a section before the last one."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    if begin not in page:
        before, after = page.split(LAST_SECTION)
        page = f"{before}\n## {title}\n\n{begin}{end}\n{LAST_SECTION}{after}"
    before, rest = page.split(begin)
    return before + begin + "".join(f"{line}\n" for line in lines) + end + rest.split(end)[1]
