import library  # noqa: F401  # checks the packages before tools import them
