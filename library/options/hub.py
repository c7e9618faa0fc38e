"""Uploads to a Hugging Face repository."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class HubOptions(Options):
    """Uploads to a Hugging Face repository."""

    huggingface_repo_id: str | None = option(
        None,
        help="Hugging Face repository that takes the saved files, as owner and name joined by a slash. Unset uploads "
        "nothing.",
    )
    huggingface_repo_type: str | None = option(None, help="Kind of the Hugging Face repository, model or dataset.")
    huggingface_path_in_repo: str | None = option(
        None,
        needs="huggingface_repo_id",
        help="Folder inside the Hugging Face repository for the uploaded files. Unset is its top folder.",
    )
    huggingface_token: str | None = option(
        None,
        help="Access token for Hugging Face. Unset uses the one that is logged in.",
    )
    huggingface_repo_visibility: str | None = option(
        None,
        needs="huggingface_repo_id",
        help="Who may see a new Hugging Face repository: public for everyone. Unset or anything else keeps it private.",
    )
    save_state_to_huggingface: bool = option(
        False,
        needs="huggingface_repo_id",
        help="Upload training states to the Hugging Face repository as well.",
    )
    resume_from_huggingface: bool = option(
        False,
        needs="resume",
        help="Fetch the state that --resume names from Hugging Face: owner, name and path, then :revision and :type if"
        " needed.",
    )
    async_upload: bool = option(
        False,
        needs="huggingface_repo_id",
        help="Upload in the background while training goes on. The last upload is always waited for.",
    )
