"""What the launcher of the processes said, before anything is set up."""

import os


def launched_rank() -> int:
    """The number of this process among those that were started; 0 for the main one."""
    return int(os.environ.get("RANK", "0"))
