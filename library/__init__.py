"""The code that all scripts share. Importing it first checks that this Python can run them."""

from library.environment.requirements import check_environment

check_environment()
