"""What can become of a numpy archive on disk."""

import zipfile
import zlib

DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    MemoryError,
    RecursionError,
)
"""What reading one that was cut, overwritten or made up raises."""

MISSING, DAMAGED = "missing", "damaged"
