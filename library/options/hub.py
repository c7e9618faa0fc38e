"""Uploads to a Hugging Face repository."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class HubOptions(Options):
    """Uploads to a Hugging Face repository."""

    huggingface_repo_id: str | None = option(None, help="")
    huggingface_repo_type: str | None = option(None, help="")
    huggingface_path_in_repo: str | None = option(None, help="")
    huggingface_token: str | None = option(None, help="")
    huggingface_repo_visibility: str | None = option(None, help="")
    save_state_to_huggingface: bool = option(False, help="")
    resume_from_huggingface: bool = option(False, help="")
    async_upload: bool = option(False, help="")
