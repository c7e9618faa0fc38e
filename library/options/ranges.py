"""Checks that numeric options are in their declared ranges."""

from math import isfinite

from library.base.errors import about
from library.options.base import Options
from library.options.declared import Declared
from library.options.kinds import SHARE, is_number

LARGEST = 2**63  # limit of 64-bit integers in tensors and files


def check_ranges(options: Options) -> None:
    """Raise UserError for the first number outside its option's range."""
    values = options.flat()
    for name, declared in type(options).declarations().items():
        value = values[name]
        for number in value if isinstance(value, list) else [value]:
            if is_number(number):
                check_number(name, number, declared)


def check_number(name: str, number: float, declared: Declared) -> None:
    """Raise UserError if a number of the option `name` is outside its range."""
    limits = declared.range
    if isinstance(number, float) and not isfinite(number):
        raise about(f"--{name}")(f"is {number}", "use a finite number")
    if declared.kind is SHARE and not limits.has(number):
        raise about(f"--{name}")(f"is {number}; it is a share, use 0 to 1")
    if limits.at_least is not None and number < limits.at_least:
        raise about(f"--{name}")(f"is {number}", f"use at least {limits.at_least}, or leave it out")
    if limits.above is not None and number <= limits.above:
        raise about(f"--{name}")(f"is {number}", f"use a number above {limits.above}, or leave it out")
    if limits.at_most is not None and number > limits.at_most:
        raise about(f"--{name}")(f"is {number}", f"use at most {limits.at_most}, or leave it out")
    if limits.below is not None and number >= limits.below:
        raise about(f"--{name}")(f"is {number}", f"use a number below {limits.below}, or leave it out")
    # Floats may be larger: only whole numbers are stored as 64-bit integers.
    if isinstance(number, int) and abs(number) >= LARGEST:
        raise about(f"--{name}")(f"is {number}", "use a number below 2^63")
