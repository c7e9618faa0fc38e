"""Checks that numeric options are in their declared ranges."""

from math import isfinite

from library.errors import UserError
from library.options.base import Declaration, Options
from library.options.kinds import is_number

LARGEST = 2**63  # limit of 64-bit integers in tensors and files


def check_ranges(options: Options) -> None:
    """Raise UserError for the first number outside its option's range."""
    values = options.flat()
    for name, declared in type(options).declarations().items():
        value = values[name]
        for number in value if isinstance(value, list) else [value]:
            if is_number(number):
                check_number(name, number, declared)


def check_number(name: str, number: float, declared: Declaration) -> None:
    """Raise UserError if a number of the option `name` is outside its range."""
    if isinstance(number, float) and not isfinite(number):
        raise UserError(f"--{name} is {number}; use a finite number")
    if declared.is_share and not 0 <= number <= 1:
        raise UserError(f"--{name} is {number}; it is a share, use 0 to 1")
    if declared.at_least is not None and number < declared.at_least:
        raise UserError(f"--{name} is {number}; use at least {declared.at_least}, or leave it out")
    if declared.above is not None and number <= declared.above:
        raise UserError(f"--{name} is {number}; use a number above {declared.above}, or leave it out")
    if declared.at_most is not None and number > declared.at_most:
        raise UserError(f"--{name} is {number}; use at most {declared.at_most}, or leave it out")
    # Floats may be larger: only whole numbers are stored as 64-bit integers.
    if isinstance(number, int) and abs(number) >= LARGEST:
        raise UserError(f"--{name} is {number}; use a number below 2^63")
