"""What is written into the header of the file."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class MetadataOptions(Options):
    """What is written into the header of the file."""

    no_metadata: bool = option(False, help="")
    training_comment: str | None = option(None, help="")
    metadata_title: str | None = option(None, help="")
    metadata_author: str | None = option(None, help="")
    metadata_description: str | None = option(None, help="")
    metadata_license: str | None = option(None, help="")
    metadata_tags: str | None = option(None, help="")
    metadata_usage_hint: str | None = option(None, help="")
    metadata_thumbnail: str | None = option(None, help="")
    metadata_merged_from: str | None = option(None, help="")
    metadata_trigger_phrase: str | None = option(None, help="")
    metadata_preprocessor: str | None = option(None, help="")
    metadata_is_negative_embedding: str | None = option(None, help="")
