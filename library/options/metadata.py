"""What is written into the header of the file."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class MetadataOptions(Options):
    """What is written into the header of the file."""

    no_metadata: bool = option(
        False,
        help="Write only the few entries that programs need to load the file, without settings, captions and folder "
        "names.",
    )
    training_comment: str | None = option(None, help="Note of yours that is kept in the file's metadata.")
    metadata_title: str | None = option(
        None,
        help="Title of the model in the file's metadata. Unset uses --output_name.",
    )
    metadata_author: str | None = option(None, help="Author of the model in the file's metadata.")
    metadata_description: str | None = option(None, help="Description of the model in the file's metadata.")
    metadata_license: str | None = option(None, help="License of the model in the file's metadata.")
    metadata_tags: str | None = option(None, help="Tags of the model in the file's metadata, separated by commas.")
    metadata_usage_hint: str | None = option(None, help="Hint in the file's metadata on how to use the model.")
    metadata_thumbnail: str | None = option(
        None,
        help="Preview picture in the file's metadata: a picture file, or a data URL.",
    )
    metadata_merged_from: str | None = option(
        None,
        help="Names of the models that this one was merged from, in the file's metadata.",
    )
    metadata_trigger_phrase: str | None = option(
        None,
        help="Words that call up what was trained, in the file's metadata.",
    )
    metadata_preprocessor: str | None = option(None, help="How pictures were prepared, in the file's metadata.")
    metadata_is_negative_embedding: str | None = option(
        None,
        help="Whether this is a negative embedding, in the file's metadata.",
    )
