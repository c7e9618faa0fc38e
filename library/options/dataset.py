"""Which images and captions are trained, and how they are shaped."""

from dataclasses import dataclass
from pathlib import Path

from library.options.base import Options, option, without_effect
from library.options.kinds import SHARE, number, whole

MAX_WORKERS = 1024  # data loader processes; more are assumed to be a typing error
# A dataset file replaces these.
FOLDER_FLAGS = ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir")
INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")
OWN_INDEX = "folders of 256 images or more have an index of their own, which notices changed files"


@dataclass(frozen=True)
class DatasetOptions(Options, needs_images=True):
    """Which images and captions are trained, and how they are shaped."""

    dataset_config: Path | None = option(
        None,
        path="file",
        usual=True,
        kept_in_state=True,
        help="TOML or JSON file that describes data sets and their folders. Replaces --train_data_dir, "
        "--reg_data_dir and --in_json; other data options are only defaults for what the file does not set.",
    )
    train_data_dir: str | None = option(
        None,
        path="folder",
        usual=True,
        kept_in_state=True,
        logged=False,
        help="Folder with the training images, in subfolders called N_name, each shown N times per epoch. With "
        "--in_json it is the folder that the images lie in.",
    )
    reg_data_dir: str | None = option(
        None,
        path="folder",
        usual=True,
        kept_in_state=True,
        logged=False,
        help="Folder with regularisation images, in subfolders called N_name. They remind the model of what it "
        "already knows; see --prior_loss_weight.",
    )
    in_json: str | None = option(
        None,
        path="file",
        kept_in_state=True,
        help="JSON file with captions and tags of the images below --train_data_dir, instead of caption files.",
    )
    dataset_repeats: int = option(1, kind=whole(1), help="How often each image of --in_json is shown per epoch.")
    dataset_class: str | None = option(
        None, help="Dotted path of a Python class that makes the batches, instead of described images."
    )
    debug_dataset: bool = option(
        False,
        usual=True,
        refused_by_leco="there are no images to show; leave it out",
        help="Show the content of each batch (images, captions, sizes), and exit without training.",
    )
    audit_only: bool = option(
        False,
        refused_by_leco="there are no images to check; leave it out",
        help="Check every image for duplicates, blur, a single colour and damage, report the problems, and exit. Needs "
        "no base model; with --output_dir a report page with thumbnails is written.",
    )
    cache_info: bool = without_effect(False, OWN_INDEX)
    shuffle_caption: bool = option(
        False,
        usual=True,
        help="Shuffle the tags of a caption each time it is used. --keep_tokens is the number of tags that stay in "
        "front.",
    )
    caption_separator: str = option(",", help="Text that separates the tags of a caption.")
    caption_extension: str = option(
        ".caption",
        usual=True,
        help="Extension of the caption files beside the images, such as .txt; a missing dot is added.",
    )
    caption_extention: str | None = option(
        None, help="Old misspelling of --caption_extension, kept for old command lines. Wins over it when set."
    )
    keep_tokens: int = option(
        0,
        usual=True,
        kind=whole(0),
        help="Number of tags at the front of a caption that are never shuffled or dropped.",
    )
    keep_tokens_separator: str = option(
        "",
        help="Mark inside captions: the tags before it stay fixed in place, a second one begins a fixed end. Empty "
        "turns it off; wins over --keep_tokens.",
    )
    secondary_separator: str | None = option(
        None,
        help="Text that joins words into one tag while shuffling and dropping, and becomes --caption_separator "
        "afterwards. Unset joins none.",
    )
    enable_wildcard: bool = option(
        False,
        help="Each time a caption is used, pick one of the alternatives in {a|b|c} at random, and one line of a "
        "caption file with several lines.",
    )
    caption_prefix: str | None = option(
        None,
        help="Text put before every caption, with a space between. It belongs to the first tag, and moves and drops "
        "with it unless --keep_tokens keeps that.",
    )
    caption_suffix: str | None = option(
        None,
        help="Text put after every caption, with a space between. It belongs to the last tag, and moves and drops with "
        "it unless --keep_tokens_separator precedes it.",
    )
    caption_dropout_rate: float = option(
        0.0,
        usual=True,
        kind=SHARE,
        help="Share of samples that are trained with an empty caption, 0 to 1. 0.05 to 0.1 helps classifier-free "
        "guidance.",
    )
    caption_dropout_every_n_epochs: int = option(
        0, kind=whole(0), help="Train every N-th epoch with empty captions. 0 never does."
    )
    caption_tag_dropout_rate: float = option(
        0.0,
        kind=SHARE,
        help="Probability of leaving out each tag of a caption, 0 to 1. Tags kept by --keep_tokens stay.",
    )
    token_warmup_min: int = option(
        1, kind=whole(0), help="Number of tags that captions begin with when --token_warmup_step lets them grow."
    )
    token_warmup_step: float = option(
        0,
        kind=number(0),
        help="Step at which captions have all their tags, growing from --token_warmup_min; below 1 a share of the run."
        " 0 uses whole captions from the start.",
    )
    color_aug: bool = option(
        False, help="Change hue or brightness of images slightly, at random. Excludes cached latents."
    )
    flip_aug: bool = option(
        False,
        usual=True,
        help="Mirror images at random, one half of the time. Unsuited to text and to subjects with a left and a right.",
    )
    face_crop_aug_range: str | None = option(
        None,
        help="Smallest and largest zoom for crops around faces, such as 2.0,4.0. File names must hold the face's "
        "position as _cx_cy_w_h. Unset crops no faces; with buckets or cached latents it has no effect.",
    )
    random_crop: bool = option(
        False,
        help="Crop images at a random position instead of the centre if they do not fit their size. Excludes cached "
        "latents.",
    )
    alpha_mask: bool = option(
        False, help="Use the alpha channel of images as a loss mask: transparent areas are not learned."
    )
    conditioning_data_dir: str | None = option(
        None,
        path="folder",
        kept_in_state=True,
        logged=False,
        help="Folder with mask images, named like the training images, for --masked_loss.",
    )
    masked_loss: bool = option(
        False,
        help="Weight the loss by mask images: white is learned in full, black not at all. Masks come from "
        "conditioning_data_dir.",
    )
    prior_loss_weight: float = option(
        1.0, kind=number(0), help="Factor on the loss of regularisation images. 1.0 weights them like training images."
    )
    resolution: str | None = option(
        None,
        usual=True,
        ignored_by_leco="--prompts_file has a resolution for each prompt",
        help="Training size in pixels, N for a square or WIDTH,HEIGHT. With --enable_bucket it is the area that other "
        "shapes keep to.",
    )
    enable_bucket: bool = option(
        False,
        usual=True,
        help="Train images in their own aspect ratio, grouped by shape, instead of cropping all to --resolution.",
    )
    min_bucket_reso: int = option(256, usual=True, kind=whole(1), help="Shortest side of a bucket in pixels.")
    max_bucket_reso: int = option(1024, usual=True, kind=whole(1), help="Longest side of a bucket in pixels.")
    bucket_reso_steps: int = option(64, kind=whole(1), help="Sides of buckets are multiples of this many pixels.")
    bucket_no_upscale: bool = option(
        False,
        usual=True,
        needs="enable_bucket",
        help="Never enlarge an image to fill a bucket; small images get buckets of their own size.",
    )
    skip_image_resolution: str | None = option(
        None,
        help="Skip images whose area is not larger than this, N for a square or WIDTH,HEIGHT in pixels. For data sets "
        "of several resolutions, so that small images are not enlarged.",
    )
    train_inpainting: bool = option(
        False,
        excludes={
            "cache_latents_to_disk": "each draw masks another area, so the masked image must be encoded each time",
            "cache_latents": "each draw masks another area, so the masked image must be encoded each time",
        },
        refused_by_leco="there are no images to mask; leave it out, and train on the plain model",
        help="Train an inpainting checkpoint, whose U-Net also sees a mask and the unmasked part of the image: each "
        "sample gets a random mask. Excludes cached latents.",
    )
    resize_interpolation: str | None = option(
        None,
        help="Method that resizes images. Unset uses area to shrink and lanczos to enlarge.",
        choices=INTERPOLATIONS,
    )
    train_batch_size: int = option(
        1,
        usual=True,
        kind=whole(1),
        ignored_by_leco="--prompts_file has a batch_size for each prompt",
        help="Samples in a batch, on each device. More is steadier and needs more memory.",
    )
    max_data_loader_n_workers: int = option(
        8,
        usual=True,
        kind=whole(0, MAX_WORKERS),
        affects_training=False,
        help="Maximum number of processes that read and prepare images, at most one per CPU core. 0 prepares them in "
        "the training process.",
    )
    persistent_data_loader_workers: bool = option(
        False,
        affects_training=False,
        help="Keep the data loading processes alive between epochs. Shortens the start of each epoch and costs memory.",
    )

    @property
    def only_looks(self) -> bool:
        """Return True if the run only inspects the data and trains nothing."""
        return self.debug_dataset or self.audit_only
