"""The errors of this suite, under the name that extensions import."""

from library.base.errors import NoDataFound, NotThere, UserError, flagged, list_few, naming, needing, reason_of, rebuild

__all__ = ["NoDataFound", "NotThere", "UserError", "flagged", "list_few", "naming", "needing", "reason_of", "rebuild"]
