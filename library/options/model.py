"""The base model and how its text is read."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class ModelOptions(Options):
    """The base model and how its text is read."""

    pretrained_model_name_or_path: str | None = option(None, help="")
    v2: bool = option(False, help="")
    v_parameterization: bool = option(False, help="")
    vae: str | None = option(None, help="")
    no_half_vae: bool = option(False, help="")
    tokenizer_cache_dir: str | None = option(None, help="")
    max_token_length: int | None = option(None, help="", choices=(None, 150, 225))
    clip_skip: int | None = option(None, help="")
    weighted_captions: bool = option(False, help="")
