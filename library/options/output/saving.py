"""When and where weights are written."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.kinds import number, whole


@dataclass(frozen=True)
class SavingOptions(Options, affects_training=False):
    """When and where weights are written."""

    output_dir: str | None = option(None, path="new folder", usual=True, logged=False)
    """Folder for saved files; created if missing."""
    output_name: str | None = option(None, usual=True)
    """Name of the saved files, without ending. Unset uses last, epoch-N and at-stepN."""
    save_precision: str | None = option(None, usual=True, choices=(None, "float", "fp32", "fp16", "bf16"))
    """Number format of saved weights: float (or fp32), fp16 or bf16. Unset keeps the format of training."""
    save_model_as: str = option("safetensors", choices=(None, "ckpt", "pt", "safetensors"))
    """Format of saved files: safetensors, or ckpt and pt, which hold no metadata."""
    save_every_n_epochs: int | None = option(
        None,
        usual=True,
        kind=whole(1),
        zero_is_unset=True,
        refused_by_leco="a run that is trained by prompts alone has steps and no epochs; use --save_every_n_steps",
    )
    """Save after every N-th epoch too. Unset or 0 does not."""
    save_every_n_steps: int | None = option(None, usual=True, kind=whole(1), zero_is_unset=True)
    """Save after every N-th step too. Unset or 0 does not."""
    save_n_epoch_ratio: int | None = option(
        None,
        kind=whole(1),
        zero_is_unset=True,
        refused_by_leco="a run that is trained by prompts alone has steps and no epochs; use --save_every_n_steps",
    )
    """Save about N times over the run, after whole epochs. Wins over --save_every_n_epochs."""
    save_last_n_epochs: int | None = option(
        None, usual=True, kind=whole(1), needs=("save_every_n_epochs", "save_n_epoch_ratio"), zero_is_unset=True
    )
    """Keep only the newest N files saved after epochs and delete older ones. Unset or 0 keeps all."""
    save_last_n_steps: int | None = option(None, kind=whole(1), needs="save_every_n_steps", zero_is_unset=True)
    """Delete files saved after steps once they are more than N steps old. Unset or 0 keeps all."""


@dataclass(frozen=True)
class HubOptions(Options, affects_training=False):
    """Uploads to a Hugging Face repository."""

    huggingface_repo_id: str | None = option(None)
    """Hugging Face repository that takes the saved files, as owner and name joined by a slash. Unset uploads
    nothing."""
    huggingface_repo_type: str | None = option(None)
    """Kind of the Hugging Face repository, model or dataset."""
    huggingface_path_in_repo: str | None = option(None, needs="huggingface_repo_id")
    """Folder inside the Hugging Face repository for the uploaded files. Unset is its top folder."""
    huggingface_token: str | None = option(None, secret=True, logged=False)
    """Access token for Hugging Face. Unset uses the one that is logged in."""
    huggingface_repo_visibility: str | None = option(None, needs="huggingface_repo_id")
    """Who may see a new Hugging Face repository: public for everyone. Unset or anything else keeps it private."""
    save_state_to_huggingface: bool = option(False, needs="huggingface_repo_id")
    """Upload training states to the Hugging Face repository as well."""
    resume_from_huggingface: bool = option(False, needs="resume")
    """Fetch the state that --resume names from Hugging Face: owner, name and path, then :revision and :type if
    needed."""
    async_upload: bool = option(False, needs="huggingface_repo_id")
    """Upload in the background while training goes on. The last upload is always waited for."""


@dataclass(frozen=True)
class StateOptions(Options, affects_training=False):
    """Saving training states, and resuming from one."""

    # The options that set where a run starts belong to this run, not to a training state.

    save_state: bool = option(False, usual=True)
    """Save the training state with every saved file and at the end, so that the run can be continued."""
    save_state_on_train_end: bool = option(False)
    """Save the training state at the end only."""
    save_every_n_minutes: float | None = option(None, kind=number(above=0))
    """Save the training state after every N minutes too, without a file to use. The newest two are kept until the run
    ends, and are not uploaded. Unset saves none."""
    save_last_n_epochs_state: int | None = option(None, kind=whole(0), needs="save_state", zero_is_unset=True)
    """Keep only the newest N states saved after epochs. Unset goes by --save_last_n_epochs."""
    save_last_n_steps_state: int | None = option(None, kind=whole(0), needs="save_state", zero_is_unset=True)
    """Delete states saved after steps once they are more than N steps old. Unset goes by --save_last_n_steps."""
    resume: str | None = option(None, path="folder", usual=True)
    """Folder of a saved training state to continue from."""
    autoresume: bool = option(False, usual=True, unless="resume")
    """Continue from the newest complete training state in --output_dir, or start at the beginning if there is none, so
    that the same command can be repeated after any stop."""
    skip_finished: bool = option(False, unless="resume")
    """End at once if --output_dir holds the adapter that this very run gives, and continue from its newest state if it
    was cut off. The runs of --sweep have it."""
    pause_after_step: int | None = option(None, kind=whole(1))
    """Save weights and state after the first validation from this step on, and end. The rounds of --sweep_stop_after do
    so."""
    skip_until_initial_step: bool = option(False)
    """Skip the data of the steps before --initial_step or before the resumed state."""
    initial_epoch: int | None = option(
        None,
        kind=whole(1),
        unless="initial_step",
        refused_by_leco="a run that is trained by prompts alone has steps and no epochs; use --initial_step",
    )
    """Epoch to begin with, counted from 1. The learning rate schedule still starts at its beginning."""
    initial_step: int | None = option(None, kind=whole(0))
    """Step to begin with, counted from 0. Wins over --initial_epoch."""

    @property
    def may_resume(self) -> bool:
        """True if the run continues from a state, if there is one."""
        return bool(self.resume or self.autoresume or self.skip_finished)


@dataclass(frozen=True)
class MetadataOptions(Options, affects_training=False):
    """Metadata in the header of saved files."""

    no_metadata: bool = option(False)
    """Write only the few entries that programs need to load the file, without settings, captions and folder names."""
    training_comment: str | None = option(None, unless="no_metadata")
    """Comment of your own in the file's metadata."""
    metadata_title: str | None = option(None)
    """Title of the model in the file's metadata. Unset uses --output_name."""
    metadata_author: str | None = option(None)
    """Author of the model in the file's metadata."""
    metadata_description: str | None = option(None)
    """Description of the model in the file's metadata."""
    metadata_license: str | None = option(None)
    """License of the model in the file's metadata."""
    metadata_tags: str | None = option(None)
    """Tags of the model in the file's metadata, separated by commas."""
    metadata_reso: str | None = option(None)
    """Resolution of the model in the file's metadata, SIDE or WIDTH,HEIGHT. Unset uses --resolution."""
    metadata_arch: str | None = option(None)
    """Architecture of the model in the file's metadata. Unset uses the base model's."""
    metadata_usage_hint: str | None = option(None)
    """Hint in the file's metadata on how to use the model."""
    metadata_thumbnail: str | None = option(None)
    """Preview image in the file's metadata: an image file, or a data URL."""
    metadata_merged_from: str | None = option(None)
    """Names of the models that this one was merged from, in the file's metadata."""
    metadata_trigger_phrase: str | None = option(None)
    """Words that trigger what was trained, in the file's metadata."""
    metadata_preprocessor: str | None = option(None)
    """How images were prepared, in the file's metadata."""
    metadata_is_negative_embedding: str | None = option(None)
    """Whether this is a negative embedding, in the file's metadata."""
