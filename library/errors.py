"""The one error that is shown to the user as a sentence."""


class UserError(ValueError):
    """Something that the user can put right: the message names the option or file, its value, and the way out.

    It is raised on purpose, at the place that uses the value. Every other exception is a fault of this program and ends
    a run with its traceback.
    """
