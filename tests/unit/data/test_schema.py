"""Dataset files: the accepted keys and the precedence of values."""

import dataclasses
import random
from pathlib import Path

import pytest

from library.base.errors import NoDataFound, UserError
from library.data.description.captions import CaptionRules, compose_caption, iterate_fullest_captions
from library.data.description.dataset_file import load_dataset_config
from library.data.description.schema import SubsetConfig
from library.options.train import TrainOptions
from tests.unit.data.builders import options_of, write_config

SUBSET = '[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "a"\n'


def load(tmp_path: Path, text: str, arguments: str = "", name: str = "data.toml") -> tuple:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return load_dataset_config(options_of(arguments, "--dataset_config", str(path))).datasets


def catch_mistakes(tmp_path: Path, text: str, arguments: str = "", name: str = "data.toml") -> str:
    with pytest.raises(ValueError) as error:
        load(tmp_path, text, arguments, name)
    return str(error.value)


def test_defaults_match_sd_scripts(tmp_path):
    (dataset,) = load(tmp_path, SUBSET)
    (subset,) = dataset.subsets
    assert (dataset.resolution, dataset.batch_size, dataset.enable_bucket) == ((512, 512), 1, False)
    assert (dataset.min_bucket_reso, dataset.max_bucket_reso, dataset.bucket_reso_steps) == (256, 1024, 64)
    assert subset.captions == CaptionRules()
    assert (subset.num_repeats, subset.caption_extension, subset.is_reg, subset.class_tokens) == (
        1,
        ".caption",
        False,
        None,
    )


LEVELS = {
    "subset": (
        "[general]\n{g}\n[[datasets]]\nresolution = 8\n{d}\n[[datasets.subsets]]\nimage_dir='a'\n{s}",
        "g d s c",
    ),
    "dataset": ("[general]\n{g}\n[[datasets]]\nresolution = 8\n{d}\n[[datasets.subsets]]\nimage_dir='a'\n", "g d c"),
    "general": ("[general]\n{g}\n[[datasets]]\nresolution = 8\n[[datasets.subsets]]\nimage_dir='a'\n", "g c"),
    "option": ("[[datasets]]\nresolution = 8\n[[datasets.subsets]]\nimage_dir='a'\n", "c"),
}


@pytest.mark.parametrize(("winner", "value"), [("subset", 3), ("dataset", 2), ("general", 1), ("option", 9)])
def test_the_most_specific_value_wins(tmp_path, winner, value):
    text = LEVELS[winner][0].format(g="keep_tokens = 1", d="keep_tokens = 2", s="keep_tokens = 3")
    (dataset,) = load(tmp_path, text, "--keep_tokens 9")
    assert dataset.subsets[0].captions.keep_tokens == value


def test_false_zero_and_empty_text_in_the_file_win_over_options(tmp_path):
    text = SUBSET + 'shuffle_caption = false\nkeep_tokens = 0\nkeep_tokens_separator = ""\n'
    (dataset,) = load(tmp_path, text, "--shuffle_caption --keep_tokens 4 --keep_tokens_separator |||")
    rules = dataset.subsets[0].captions
    assert (rules.shuffle_caption, rules.keep_tokens, rules.keep_tokens_separator) == (False, 0, "")


def test_train_batch_size_and_dataset_repeats_are_defaults_for_the_file(tmp_path):
    (dataset,) = load(tmp_path, SUBSET, "--train_batch_size 3 --dataset_repeats 5 --caption_extention txt")
    assert (dataset.batch_size, dataset.subsets[0].num_repeats) == (3, 5)
    assert dataset.subsets[0].caption_extension == ".txt"


@pytest.mark.parametrize(("text", "size"), [("512", (512, 512)), ("768,512", (768, 512)), ("768, 512", (768, 512))])
def test_the_resolution_may_be_given_on_the_command_line(tmp_path, text, size):
    path = tmp_path / "data.toml"
    path.write_text(SUBSET.replace("resolution = 512", ""))
    options = options_of("", "--dataset_config", str(path), "--resolution", text)
    assert load_dataset_config(options).datasets[0].resolution == size


def test_json_and_toml_files_are_equivalent(tmp_path):
    text = '{"general": {"batch_size": 2}, "datasets": [{"resolution": [64, 32], "subsets": [{"image_dir": "a"}]}]}'
    toml = "[general]\nbatch_size=2\n[[datasets]]\nresolution=[64,32]\n[[datasets.subsets]]\nimage_dir='a'\n"
    assert load(tmp_path, text, name="data.JSON") == load(tmp_path, toml)


MISTAKES = [
    (
        SUBSET + "num_repeat = 2",
        r"data['datasets'][0]['subsets'][0]['num_repeat'] is not a key (did you mean num_repeats?)",
    ),
    (
        SUBSET + "batch_size = 2",
        "['subsets'][0]['batch_size'] is not allowed here; it belongs in [general] or [[datasets]]",
    ),
    (
        "[general]\nalpha_mask = true\n" + SUBSET,
        "data['general']['alpha_mask'] is not allowed here; it belongs in [[datasets.sub",
    ),
    ("[genral]\n" + SUBSET, "data['genral'] is not a key (did you mean general?)"),
    (SUBSET + "num_repeats = '2'", "['num_repeats'] is '2', but must be a whole number"),
    (SUBSET + "flip_aug = 1", "['flip_aug'] is 1, but must be true or false"),
    (SUBSET + "face_crop_aug_range = [3, 1]", "['face_crop_aug_range'] is [3, 1], but must be two positive numbers"),
    (SUBSET + "resize_interpolation = 'best'", "['resize_interpolation'] is 'best', but must be one of lanczos"),
    (
        SUBSET.replace("512", "'512'"),
        "data['datasets'][0]['resolution'] is '512', but must be a side from 1 to 16384, or [width, height]",
    ),
    ("[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nnum_repeats = 1", "['image_dir'] is missing"),
    ("[[datasets]]\nresolution = 512", "['subsets'] must be an array of tables"),
    ("datasets = 3", "data['datasets'] must be an array of tables"),
    (SUBSET + "conditioning_data_dir = 'm'", "conditioning_data_dir requires --masked_loss"),
    (SUBSET + "[[datasets.subsets]]\nmetadata_file = 'm.json'", "only some subsets have metadata_file"),
    (SUBSET + "caption_separator = ''", "['caption_separator'] is '', but must be a text"),
    (SUBSET + "caption_dropout_rate = 1.5", "['caption_dropout_rate'] is 1.5, but must be a number from 0 to 1"),
    (SUBSET.replace("resolution = 512", ""), "['resolution'] is missing"),
    (SUBSET.replace("resolution = 512", "resolution = 512\nbatch_size = 0"), "['batch_size'] is 0"),
    (
        SUBSET.replace("resolution = 512", "resolution = 512\nskip_image_resolution = [-1, -9]"),
        "['skip_image_resolution'] is [-1, -9], but must be a side from 0",
    ),
    (
        SUBSET.replace("resolution = 512", f"resolution = 512\nbatch_size = {10**30}"),
        f"['batch_size'] is {10**30}, but must be a whole number from 1 to 2147483647",
    ),
    (SUBSET + "control_resolution = [64, 100000]", "['control_resolution'] is [64, 100000], but must be a side from "),
    (SUBSET + f"keep_tokens = {'9' * 5000}", "data.toml is not valid TOML: it has a number of thousands of digits"),
    (SUBSET + f"keep_tokens = 0x{'f' * 5000}", "data.toml has a number of more than 300 digits; use a smaller one"),
    (SUBSET + "token_warmup_step = nan", "['token_warmup_step'] is nan, but must be a number"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_raise_errors_that_name_their_place(tmp_path, text, message):
    assert message in catch_mistakes(tmp_path, text)


def test_whole_numbers_and_fractions_are_numbers_of_either_kind(tmp_path):
    """sd-scripts refuses integers where it expects a float."""
    text = SUBSET + "validation_split = 0\nface_crop_aug_range = [1, 3]\nnum_repeats = 2.0\nkeep_tokens = true\n"
    ((subset,),) = (dataset.subsets for dataset in load(tmp_path, text))
    values = (subset.validation_split, subset.face_crop_aug_range, subset.num_repeats, subset.captions.keep_tokens)
    assert values == (0.0, (1.0, 3.0), 2, 1) and [type(value) for value in values] == [float, tuple, int, int]


def test_all_mistakes_are_reported_at_once(tmp_path):
    message = catch_mistakes(tmp_path, "[general]\nshufle_caption = true\n" + SUBSET + "num_repeats = 1.5\n")
    assert "did you mean shuffle_caption?" in message and "['num_repeats'] is 1.5" in message


def test_keys_of_another_style_are_refused(tmp_path):
    text = "[[datasets]]\nresolution = 8\n[[datasets.subsets]]\nmetadata_file = 'm.json'\nclass_tokens = 'x'\n"
    assert "['class_tokens'] is not allowed here; it is only for subsets of style dreambooth" in catch_mistakes(
        tmp_path, text
    )


def test_attributes_without_effect_are_warned_about_and_wrong_values_refused(tmp_path, caplog):
    load(tmp_path, SUBSET + "custom_attributes = {diff_output_preservaton = true, timestep_sampling = {ofset = 0.3}}\n")
    assert "diff_output_preservaton has no effect (did you mean diff_output_preservation?)" in caplog.text
    assert "timestep_sampling.ofset has no effect (did you mean offset?)" in caplog.text
    with pytest.raises(UserError, match="'false', but must be true, false or a table of its keys"):
        load(tmp_path, SUBSET + "custom_attributes = {diff_output_preservation = 'false'}\n")
    with pytest.raises(UserError, match=r"diff_output_preservation\.weight is -1, but must be a number from 0"):
        load(tmp_path, SUBSET + "custom_attributes = {diff_output_preservation = {weight = -1}}\n")
    masked = SUBSET + "custom_attributes = {diff_output_preservation = {outside_mask = true}}\n"
    with pytest.raises(UserError, match="outside_mask of diff_output_preservation needs masks"):
        load(tmp_path, masked)
    load(tmp_path, masked + "alpha_mask = true\n")


def test_a_preserved_subset_may_have_one_caption(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In place of the images' own with all their changes; dropout stays."""
    words = "custom_attributes = {diff_output_preservation = {caption = 'a cat', num_step = 4}}\ncaption_prefix = 'x'\n"
    rules = load(tmp_path, SUBSET + words + "shuffle_caption = true\n")[0].subsets[0].captions
    assert compose_caption("mycat, red", rules, random.Random(1), 1, 0, 10) == "a cat" and not rules.varies
    assert list(iterate_fullest_captions("mycat, red", rules)) == ["a cat"]
    assert "diff_output_preservation.num_step has no effect (did you mean num_steps?)" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--in_json m.json --reg_data_dir reg", "--reg_data_dir is ignored: --in_json describes all images"),
        ("--in_json m.json --conditioning_data_dir m", "--conditioning_data_dir is ignored: --in_json describes all"),
        (
            "--masked_loss --conditioning_data_dir m --reg_data_dir reg",
            "--reg_data_dir is ignored: with --conditioning",
        ),
        ("--masked_loss --conditioning_data_dir m --alpha_mask", "--alpha_mask has no effect: the masks of condition"),
        (
            "--in_json m.json --max_bucket_reso 2048",
            "command line: max_bucket_reso has no effect without enable_bucket",
        ),
        ("--masked_loss --in_json m.json", "--masked_loss has no effect: no subset has masks; set conditioning_data"),
        ("--masked_loss --in_json m.json --alpha_mask", ""),
    ],
)
def test_folder_options_without_effect_are_warned_about(arguments, message, caplog):
    load_dataset_config(options_of(f"--resolution 64 --train_data_dir a {arguments}"))
    assert message in caplog.text and bool(message) == bool(caplog.text)


def test_repeats_of_numbered_folders_win_over_the_option(tmp_path, caplog):
    (tmp_path / "2_a").mkdir()
    load_dataset_config(options_of(f"--resolution 64 --train_data_dir {tmp_path} --dataset_repeats 3"))
    assert "--dataset_repeats is ignored: folders called N_name have their own repeats" in caplog.text


def test_general_keys_that_no_subset_can_use_are_warned_about(tmp_path, caplog):
    general = "[general]\nclass_tokens = 'x'\n"
    metadata = "[[datasets]]\nresolution = 8\n[[datasets.subsets]]\nmetadata_file = 'm.json'\n"
    assert [dataset.style for dataset in load(tmp_path, general + metadata + SUBSET)] == ["metadata", "dreambooth"]
    assert "class_tokens" not in caplog.text
    assert [dataset.style for dataset in load(tmp_path, general + metadata)] == ["metadata"]
    assert "class_tokens in [general] has no effect: it is for subsets of style dreambooth or masked" in caplog.text


def test_syntax_errors_name_file_line_and_column(tmp_path):
    message = catch_mistakes(tmp_path, "[general]\nbatch_size = = 2\n")
    assert "data.toml is not valid TOML" in message and "line 2, column 14" in message
    assert "line 1 column 2" in catch_mistakes(tmp_path, "{bad", name="data.json")
    long = f'{{"datasets": {"9" * 5000}}}'
    assert "is not valid JSON: it has a number of thousands" in catch_mistakes(tmp_path, long, name="data.json")


def test_missing_files_and_other_formats_are_refused(tmp_path):
    assert "must end in .toml or .json" in catch_mistakes(tmp_path, "", name="data.yaml")
    for name in ("none.toml", "none.json"):
        with pytest.raises(UserError, match="there is no such file"):
            load_dataset_config(options_of("", "--dataset_config", str(tmp_path / name)))


def test_a_byte_order_mark_is_accepted(tmp_path):
    (tmp_path / "data.toml").write_bytes(b"\xef\xbb\xbf" + SUBSET.encode())
    assert load_dataset_config(options_of("", "--dataset_config", str(tmp_path / "data.toml"))).datasets


def test_validation_keys_may_be_set_per_subset(tmp_path):
    text = "[general]\nvalidation_seed = 4\n" + SUBSET.replace("resolution", "validation_split = 0.5\nresolution")
    text += "[[datasets.subsets]]\nimage_dir = 'b'\nvalidation_split = 0.25\nvalidation_seed = 3\n"
    (dataset,) = load(tmp_path, text, "--validation_split 0.125 --validation_seed 9")
    assert [(s.validation_split, s.validation_seed) for s in dataset.subsets] == [(0.5, 4), (0.25, 3)]
    (dataset,) = load(tmp_path, SUBSET, "--validation_split 0.125 --validation_seed 9")
    assert [(s.validation_split, s.validation_seed) for s in dataset.subsets] == [(0.125, 9)]


def test_masks_make_a_masked_dataset_and_refuse_random_crops(tmp_path):
    text = SUBSET + "conditioning_data_dir = 'm'\n"
    assert load(tmp_path, text, "--masked_loss")[0].style == "masked"
    assert "random_crop does not work" in catch_mistakes(tmp_path, text + "random_crop = true\n", "--masked_loss")


def test_a_subset_with_zero_repeats_is_skipped_with_a_warning(tmp_path, caplog):
    (dataset,) = load(tmp_path, SUBSET + "num_repeats = 0\n")
    assert dataset.subsets == ()
    assert "a is skipped: num_repeats is 0" in caplog.text


def test_network_multiplier_is_warned_about_as_without_effect(tmp_path, caplog):
    load(tmp_path, SUBSET.replace("512", "512\nnetwork_multiplier = 0.5"))
    assert "['network_multiplier'] has no effect" in caplog.text


def test_cache_info_is_warned_about_as_replaced_by_an_index(tmp_path, caplog):
    load(tmp_path, SUBSET.replace("512", "512\ncache_info = true"))
    assert "['cache_info'] has no effect: folders of 256 images or more have an index" in caplog.text


def test_folder_arguments_are_ignored_with_a_warning_if_a_file_is_given(tmp_path, caplog):
    load(tmp_path, SUBSET, "--train_data_dir elsewhere")
    assert "--train_data_dir is ignored" in caplog.text


def folder_options(tmp_path: Path, *names: str, arguments: str = "") -> TrainOptions:
    for name in names:
        (tmp_path / "train" / name).mkdir(parents=True)
    return options_of(f"--resolution 64 {arguments}", "--train_data_dir", str(tmp_path / "train"))


def test_folder_names_give_repeats_and_class_tokens(tmp_path):
    options = folder_options(tmp_path, "3_big_cat", "10_a", "2_b", "0_no", "dog", "-1_no")
    (dataset,) = load_dataset_config(options).datasets
    subsets = [(subset.base_name, subset.num_repeats, subset.class_tokens) for subset in dataset.subsets]
    assert subsets == [("10_a", 10, "a"), ("2_b", 2, "b"), ("3_big_cat", 3, "big_cat")]


def test_folders_without_a_number_are_skipped_with_a_warning(tmp_path, caplog):
    load_dataset_config(folder_options(tmp_path, "1_a", "dog"))
    assert "folder dog is skipped" in caplog.text


def test_regularisation_folders_become_regularisation_subsets(tmp_path):
    (tmp_path / "reg" / "4_cat").mkdir(parents=True)
    options = folder_options(tmp_path, "1_a", arguments=f"--reg_data_dir {tmp_path / 'reg'}")
    (dataset,) = load_dataset_config(options).datasets
    assert [(subset.base_name, subset.is_reg) for subset in dataset.subsets] == [("1_a", False), ("4_cat", True)]


def test_images_directly_in_the_parent_folder_are_counted(tmp_path):
    for name in ("a.png", "b.JPG", "c.txt"):
        (tmp_path / name).touch()
    with pytest.raises(NoDataFound, match="it directly contains 2 images, move them into such a folder"):
        load_dataset_config(options_of("--resolution 64 --train_data_dir", str(tmp_path)))


@pytest.mark.parametrize("names", [(), ("dog",)])
def test_a_parent_without_numbered_folders_has_no_data(tmp_path, names):
    (tmp_path / "train").mkdir(exist_ok=True)
    with pytest.raises(NoDataFound, match="called N_name"):
        load_dataset_config(folder_options(tmp_path, *names))


def test_a_missing_regularisation_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"--reg_data_dir .* is not a folder") as error:
        load_dataset_config(folder_options(tmp_path, "1_a", arguments=f"--reg_data_dir {tmp_path / 'none'}"))
    assert not isinstance(error.value, NoDataFound)


def test_in_json_makes_one_subset(tmp_path):
    options = options_of("--resolution 64 --in_json m.json --train_data_dir images --dataset_repeats 2")
    (dataset,) = load_dataset_config(options).datasets
    (subset,) = dataset.subsets
    assert (dataset.style, subset.metadata_file, subset.image_dir, subset.num_repeats) == (
        "metadata",
        "m.json",
        "images",
        2,
    )


def test_conditioning_data_dir_on_the_command_line_gives_masks():
    options = options_of("--resolution 64 --train_data_dir a --conditioning_data_dir m --masked_loss")
    (dataset,) = load_dataset_config(options).datasets
    assert (dataset.style, dataset.subsets[0].conditioning_data_dir) == ("masked", "m")


def test_a_dataset_class_has_no_images_to_load():
    with pytest.raises(ValueError, match=r"--dataset_class my.Set makes batches during training"):
        load_dataset_config(options_of("--dataset_class my.Set"))


@pytest.mark.parametrize(
    "arguments", ["--resolution 1,2,3", "--resolution 99999", "--resolution big", "--face_crop_aug_range 1"]
)
def test_options_that_cannot_be_parsed_are_refused_by_name(arguments):
    with pytest.raises(ValueError, match=arguments.split()[0]):
        load_dataset_config(options_of("--train_data_dir a " + arguments))


def test_whole_floats_from_front_ends_become_ints(tmp_path):
    options = folder_options(tmp_path, "1_a")
    data = dataclasses.replace(options.dataset, train_batch_size=2.0, face_crop_aug_range="1,3")  # type: ignore[arg-type]
    (dataset,) = load_dataset_config(dataclasses.replace(options, dataset=data)).datasets
    assert (dataset.batch_size, dataset.subsets[0].face_crop_aug_range) == (2, (1.0, 3.0))


def test_configurations_are_immutable(tmp_path):
    (dataset,) = load(tmp_path, SUBSET)
    subset: SubsetConfig = dataset.subsets[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        subset.num_repeats = 2  # type: ignore[misc]
    assert write_config(tmp_path / "x.toml", SUBSET).dataset.dataset_config == tmp_path / "x.toml"


TWO_SIZES = SUBSET + SUBSET.replace("resolution = 512\n", "").replace('"a"', '"b"')


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (SUBSET, "--resolution 1024", "--resolution 1024 has no effect: {path} sets resolution = 512; change it there"),
        (SUBSET, "--resolution 512,512", ""),
        (SUBSET, "--train_batch_size 4", ""),  # the file says nothing
        ("[general]\nbatch_size = 2\n" + SUBSET, "--train_batch_size 4", "--train_batch_size 4 has no effect: {path} "),
        ("[general]\nbatch_size = 2\n" + SUBSET, "--train_batch_size 1", ""),  # as front ends send the default
        (TWO_SIZES, "--resolution 768,1024", "--resolution 768,1024 is used in 1 of 2 data sets only: {path} sets"),
        (TWO_SIZES, "--resolution 512", ""),
        (SUBSET + "flip_aug = false\n", "--flip_aug", "--flip_aug has no effect: {path} sets flip_aug = false;"),
        (SUBSET + "caption_extension = 'txt'\n", "--caption_extension .txt", ""),
        (SUBSET + "num_repeats = 2\n", "--dataset_repeats 3", "--dataset_repeats 3 has no effect: {path} sets num_rep"),
    ],
)
def test_options_that_the_file_overrides_are_warned_about_where_the_values_differ(
    tmp_path, caplog, text, arguments, message
):
    load(tmp_path, text, arguments)
    assert message.format(path=tmp_path / "data.toml") in caplog.text and bool(message) == bool(caplog.text)
