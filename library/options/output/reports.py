"""Events of a run for programs, and a report for people."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class ReportOptions(Options, affects_training=False):
    """Events of a run for programs, and a report for people."""

    log_events: str | None = option(None, path="new file", unless="dry_run")
    """File for the events of the run, one JSON object per line, for front ends and other programs; - is standard
    output. Overwritten at the start, appended to with --resume and --autoresume."""
    report_live: bool = option(False, unless="no_report")
    """Write the report every 10 s, as a page that reloads itself in the browser until the run ends. Unset writes it
    every 30 s, without reloading."""
    no_report: bool = option(False)
    """Write no report. Unset keeps an HTML file with charts, previews and saved files in --output_dir."""
