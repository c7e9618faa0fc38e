"""The names of training states; read without torch."""

import re
from collections.abc import Iterable

MANIFEST_FILE = "train_state.json"  # of a state, which is written last
MOMENT = r"-step\d+|-\d{6,7}"  # of saving, after the run's name. Epochs have six digits, dates in names often eight.
STATE = "-state"  # end of a state folder's name
TIMED = "-timed"  # before it, in the name of a state of --save_every_n_minutes
STATE_ENDING = re.compile(rf"({MOMENT}|-step\d+{TIMED})?{STATE}")


def is_of_run(text: str, names: Iterable[str], ending: re.Pattern[str]) -> bool:
    """Return True if `text` is the name of a run, which may itself end in a date, followed by `ending`."""
    return any(text.startswith(name) and ending.fullmatch(text, len(name)) for name in names)


def is_state_name(folder: str, names: tuple[str, ...]) -> bool:
    """Return True if a folder has the name of a state of a run with one of `names`."""
    return is_of_run(folder, names, STATE_ENDING)
