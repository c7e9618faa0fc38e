"""The image folders of the command line as subsets of a dataset file."""

import logging
import os
from collections.abc import Sequence

from library.base.errors import NoDataFound, UserError, about
from library.data.description.keys import Style
from library.data.description.schema import explain_missing_folder
from library.options.dataset import DatasetOptions
from library.options.tables import Table

logger = logging.getLogger(__name__)


def list_subsets(data: DatasetOptions) -> tuple[Style, list[Table]]:
    """Return the subsets that `train_data_dir`, `reg_data_dir`, `in_json` and `conditioning_data_dir` describe."""
    folder, masks = data.train_data_dir, data.conditioning_data_dir
    if data.in_json:
        warn_of_ignored(data, ("reg_data_dir", "conditioning_data_dir"), "--in_json describes all images")
        return "metadata", [{"image_dir": folder, "metadata_file": data.in_json}]
    if not folder:
        raise NoDataFound("use --dataset_config or --train_data_dir", setting="--dataset_config", cause="missing")
    if masks:
        if not data.masked_loss:
            raise about("--conditioning_data_dir", cause="needs")("requires --masked_loss")
        warn_of_ignored(data, ("reg_data_dir",), "with --conditioning_data_dir all images have masks")
        return "masked", [{"image_dir": folder, "conditioning_data_dir": masks}]
    subsets = list_numbered_folders("--train_data_dir", folder, is_reg=False)
    if not subsets:
        num_direct = num_images_in(folder)
        raise NoDataFound(
            f"--train_data_dir {folder} must be the parent of image folders called N_name, such as 10_cat"
            + (f"; it directly contains {num_direct} images, move them into such a folder" if num_direct else ""),
            setting="--train_data_dir",
            path=folder,
        )
    if data.dataset_repeats > 1:
        logger.warning("--dataset_repeats is ignored: folders called N_name have their own repeats")
    if data.reg_data_dir:
        subsets += list_numbered_folders("--reg_data_dir", data.reg_data_dir, is_reg=True)
    return "dreambooth", subsets


def warn_of_ignored(data: DatasetOptions, flags: Sequence[str], reason: str) -> None:
    """Warn about those of the options `flags` that are given although something else replaces them."""
    for flag in flags:
        if getattr(data, flag):
            logger.warning("--%s is ignored: %s", flag, reason)


def num_images_in(folder: str) -> int:
    """Count the images of a folder by extension, without its subfolders."""
    # Imported here because it imports Pillow, which nothing else in this module needs.
    from library.data.description.image_extensions import image_extensions

    return sum(os.path.splitext(name)[1] in image_extensions() for name in os.listdir(folder))


def list_numbered_folders(flag: str, parent: str, is_reg: bool) -> list[Table]:
    """Return the subfolders of `parent` named `N_name` as subsets, sorted by name: N repeats of class `name`."""
    if not os.path.isdir(parent):
        raise (UserError if is_reg else NoDataFound)(f"{flag} {explain_missing_folder(parent)}")
    subsets: list[Table] = []
    # Sorted, because the order of the file system, which sd-scripts takes, differs between machines.
    for name in sorted(entry.name for entry in os.scandir(parent) if os.path.isdir(entry.path)):
        # Further underscores belong to the class: 10_my_cat is 10 repeats of my_cat.
        number, _, class_tokens = name.partition("_")
        try:
            num_repeats = int(number)
        except ValueError:
            logger.warning("%s: folder %s is skipped: its name does not start with a number of repeats", flag, name)
            continue
        if num_repeats < 1:
            logger.info("%s: folder %s is skipped: it has %d repeats", flag, name, num_repeats)
            continue
        path = os.path.join(parent, name)
        subsets.append({"image_dir": path, "num_repeats": num_repeats, "class_tokens": class_tokens, "is_reg": is_reg})
    return subsets
