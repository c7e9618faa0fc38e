"""What train.py decides before it trains: recipe, steps, size, captions, parts, prediction."""

import re
import shutil
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import train
from library.architectures.specs import list_specs
from library.base.errors import UserError
from library.data.decoding.images import MODEL
from library.data.plan.data_plan import build_plan
from library.options.train import TrainOptions
from library.train_photos.base import (
    Base,
    Kind,
    choose_recipe,
    measure_losses,
    measure_prediction,
    read_prediction,
    recognise,
)
from library.train_photos.command_line import read_command_line
from library.train_photos.description import (
    describe_given,
    describe_photos,
    list_captions,
    list_folders,
    list_part_names,
    remark_on_trigger,
)
from library.train_photos.parts import find_parts, find_training_adapter
from library.train_photos.photos import PhotoFolder, Trigger, find_photos, parse_trigger, select_photos, suggest_trigger
from library.train_photos.plan import (
    Files,
    Plan,
    RunOrder,
    choose_length,
    choose_repeats,
    choose_side,
    choose_values,
    compose_captions,
    find_problems,
    read_options,
    write_prompts,
)
from library.training.command_line.recipes import list_recipes
from library.training.config_file import format_config
from tests.hiding import lazily
from tests.running import make_images
from tests.tiny.bases import BASES
from tests.train_photos.test_train import GENERIC, KINDS, build_base, draw_photo
from tests.unit.data.builders import SPEC
from tools.recipes import interpolate_steps

diffusers = lazily("diffusers")

HEARTS, TOY = "configs/quickstart/dataset", "configs/quickstart/toy_base"


def base_of(spec: str, name: str, *tensors: str) -> Base:
    (found,) = (candidate for candidate in list_specs() if candidate.name == spec)
    return Base(name, Path(name), found, dict.fromkeys(tensors, ()))


def order_of(base: Base, kind: Kind, folders: Sequence[PhotoFolder], trigger: Trigger) -> RunOrder:
    return RunOrder(Namespace(class_images=0), base, choose_recipe(base, kind), folders, trigger, 64)


@pytest.mark.parametrize(
    ("base", "kind", "recipe"),
    [
        (base_of("sd1", "/m/v1-5-pruned.safetensors"), "style", "sd15_style"),
        (base_of("sd1", "/m/toy_base"), "character", "toy_character"),
        (base_of("sd2", "/m/v2-1_768.safetensors"), "style", "sd2_character"),  # the only one
        (base_of("sdxl", "/m/sd_xl_base_1.0.safetensors"), "character", "sdxl_character"),
        (base_of("sdxl", "/m/waiNSFWIllustrious_v140.safetensors"), "style", "sdxl_anime_style"),
        (base_of("sd3", "/m/a.safetensors", "joint_blocks.37.x"), "style", "sd35_large_style"),
        (base_of("sd3", "/m/a.safetensors", "joint_blocks.3.x_block.attn2.qkv"), "style", "sd35_medium_style"),
        (base_of("sd3", "/m/a.safetensors", "joint_blocks.3.x"), "style", "sd3_medium_character"),
        (base_of("flux", "/m/flux1-dev.safetensors"), "character", "flux_character"),
        (base_of("chroma", "/m/Chroma1-HD.safetensors"), "character", "chroma_character"),
        (base_of("any_pipeline", "/m/pixart"), "style", "diffusers_character"),
    ],
)
def test_the_recipe_that_suits_the_base_is_taken(base: Base, kind: str, recipe: str) -> None:
    assert choose_recipe(base, kind).name == recipe  # type: ignore[arg-type]


def test_every_base_model_has_a_recipe() -> None:
    for spec in list_specs():
        recipe = choose_recipe(base_of(spec.name, "/m/a.safetensors"), "character")
        assert recipe.script == spec.script and not recipe.name.startswith("plain_")


@pytest.mark.parametrize("name", ["sd1", "zimage"])
def test_a_base_model_without_recipes_gets_plain_settings_that_its_script_has(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = base_of(name, "/m/a.safetensors").spec
    others = [recipe for recipe in list_recipes() if recipe.script != spec.script]
    monkeypatch.setattr("library.train_photos.base.list_recipes", lambda: others)
    recipe = choose_recipe(base_of(name, "/m/a.safetensors"), "style")
    assert (recipe.script, recipe.name) == (spec.script, "plain_style")
    assert recipe.values.keys() <= spec.options.defaults().keys()
    assert ("cache_text_encoder_outputs_to_disk" in recipe.values) == (name == "zimage")
    assert recipe.values["learning_rate"] == 1e-4 and recipe.steps


@pytest.mark.parametrize(
    ("num_images", "steps"),
    [(15, 1200), (30, 1800), (100, 3500), (21, 1460), (200, 5130), (5, 400), (3, 240), (1, 80), (3000, 10_000)],
)
def test_steps_lie_on_a_curve_with_bounds_for_few_and_for_many_photos(num_images: int, steps: int) -> None:
    assert interpolate_steps({15: 1200, 30: 1800, 100: 3500}, num_images) == steps


@pytest.mark.parametrize(
    ("name", "distilled"),
    [("z_image_turbo_bf16", True), ("flux2-klein-4b", True), ("flux2-klein-base-4b", False), ("sdxl_lightning", True),
     ("flux1-schnell", True), ("flux1-dev", False), ("raw", False), ("ponyDiffusionV6XL", False)],
)  # fmt: skip
def test_a_distilled_base_is_noticed_by_its_name(name: str, distilled: bool) -> None:
    assert base_of("sdxl", f"/m/{name}.safetensors").is_distilled is distilled


def test_photos_that_cannot_be_trained_on_are_left_out_with_the_reason(tmp_path: Path) -> None:
    KINDS["damaged"](tmp_path)
    (tmp_path / "clip.psd").write_bytes(b"8BPS")
    (tmp_path / ".thumbnails").mkdir()
    (folder,) = find_photos(tmp_path)
    assert len(folder.photos) == 3
    reasons = {path.name: reason for path, reason in folder.left_out}
    assert "cannot be read" in reasons["broken.jpg"] and "unsupported" in reasons["clip.psd"]


def write_photos(folder: Path, **sizes: int) -> None:
    folder.mkdir(exist_ok=True)
    for number, (name, side) in enumerate(sizes.items()):
        draw_photo(number).resize((side, side)).save(folder / f"{name}.png")


def names_of(folders: list[PhotoFolder]) -> list[str]:
    return [photo.path.name for folder in folders for photo in folder.photos]


def test_copies_and_very_small_photos_are_left_out_unless_all_are_kept(tmp_path: Path) -> None:
    write_photos(tmp_path, a=600, b=200)
    (tmp_path / "below").mkdir()
    shutil.copy(tmp_path / "a.png", tmp_path / "below" / "copy.png")
    (tmp_path / "below" / "copy.txt").write_text("a cat")  # of two copies, that with a caption stays
    folders = find_photos(tmp_path)
    selected = select_photos(tmp_path, folders, 1024, [], False)
    assert names_of(selected) == ["copy.png"]
    text = describe_photos(selected)
    assert "left out: a.png, the same file as another; left out: b.png, below a quarter of 1024 px" in text
    assert selected[0].describe(Trigger("x"))["exclude"] == ["a.png", "b.png"]
    assert names_of(select_photos(tmp_path, folders, 1024, [], True)) == ["a.png", "b.png", "copy.png"]


def test_photos_are_left_out_by_name_path_and_folder(tmp_path: Path) -> None:
    write_photos(tmp_path, a=600, b=601, c=602)
    write_photos(tmp_path / "rejects", d=603, e=604)
    folders = find_photos(tmp_path)
    lines = "\n".join(list_folders(folders))
    assert lines.endswith("rejects: 2 photos; its name says that it is not wanted: --leave_out rejects")
    left = select_photos(tmp_path, folders, 512, ["a.png", str(tmp_path / "b.png"), "rejects"], False)
    assert names_of(left) == ["c.png"]
    with pytest.raises(UserError, match=r"--leave_out: no photo in .* is named d.jpg \(did you mean d.png"):
        select_photos(tmp_path, folders, 512, ["d.jpg"], False)
    with pytest.raises(UserError, match="no photo that is not left out"):
        select_photos(tmp_path, folders, 512, ["rejects", "a.png", "b.png", "c.png"], False)


def test_other_problems_are_named_and_the_photos_kept(tmp_path: Path) -> None:
    draw_photo(1).resize((1170, 2532)).save(tmp_path / "IMG_1.PNG")
    exif = Image.Exif()
    exif[MODEL] = "iPhone"
    for number, name in ((1, "near"), (2, "photo")):
        draw_photo(number).resize((1170, 2532)).save(tmp_path / f"{name}.jpg", exif=exif, quality=98)
    write_photos(tmp_path, small=500)
    photos = [photo for folder in find_photos(tmp_path) for photo in folder.photos]
    lines = [finding.line for finding in find_problems(photos, 1024, uses_alpha=False)]
    assert any(re.match(r"1 image like screenshots.*: IMG_1.PNG \(1170x2532\)", line) for line in lines), lines
    assert any("near-duplicated" in line and "IMG_1.PNG" in line and "near.jpg" in line for line in lines)
    assert any("upscaled more than 1.5x" in line and "small.png (500x500)" in line for line in lines)
    assert any("blurred all over" in line for line in lines)


@pytest.mark.parametrize(("num_photos", "batch_size", "repeats"), [(3, 2, 3), (3, 1, 2), (12, 2, 1), (3000, 2, 1)])
def test_few_photos_are_repeated_until_an_epoch_has_full_batches(
    num_photos: int, batch_size: int, repeats: int
) -> None:
    assert choose_repeats(batch_size, num_photos) == repeats


def test_of_many_photos_only_some_are_set_aside() -> None:
    assert choose_length(1000, 100)["validation_split"] == 0.1
    assert choose_length(10_000, 3000)["validation_split"] == 50 / 3000
    assert choose_length(100, 12) == {"max_train_steps": 100, "save_every_n_steps": 25, "sample_every_n_steps": 25}


@pytest.mark.parametrize(
    ("captions", "trained"),
    [
        ([], ["mycat, a cat"] * 3),
        (["a cat on a sofa", "", "my MyCat asleep"], ["mycat, a cat on a sofa", "mycat", "my MyCat asleep"]),
        (["mycat on a sofa", "mycats, a sofa"], ["mycat on a sofa", "mycat, mycats, a sofa", "mycat, a cat"]),
    ],
)
def test_the_trigger_goes_before_each_caption_that_lacks_it(
    captions: list[str], trained: list[str], tmp_path: Path
) -> None:
    for number in range(3):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"{number}.png")
    for number, caption in enumerate(captions):
        (tmp_path / f"{number}.txt").write_text(caption)
    (folder,) = find_photos(tmp_path)
    dataset = {"datasets": [{"resolution": 64, "subsets": [folder.describe(parse_trigger(" mycat , a cat"))]}]}
    (tmp_path / "dataset.toml").write_text(format_config(dataset))
    options = TrainOptions().with_values({"dataset_config": str(tmp_path / "dataset.toml"), "max_train_steps": 1})
    plan = build_plan(options, SPEC, 0, lambda text: len(text), None, 1)
    assert compose_captions(plan) == trained


def test_what_the_user_typed_wins_over_a_folders_words_and_the_plan_says_so(tmp_path: Path) -> None:
    make_images(tmp_path / "10_sks cat", 2)
    make_images(tmp_path / "2_other dog", 2)
    base, folders = base_of("sd1", "/m/a.safetensors"), find_photos(tmp_path)
    for text, class_tokens, said in (
        ("mycat, a cat", ["mycat, a cat"] * 2, '"mycat, a cat", as given, and not its words'),
        (None, ["sks cat", "other dog"], '"sks cat", its words'),
    ):
        trigger = parse_trigger(text) if text else suggest_trigger(tmp_path, folders)
        assert [folder.describe(trigger)["class_tokens"] for folder in folders if folder.photos] == class_tokens
        plan = Plan(order_of(base, "style", folders, trigger), {}, captions=["a", "b c d", "b c d", "x"])
        lines = "\n".join(list_captions(plan))
        assert f"10_sks cat: each photo 10 times; without a caption {said}" in lines
        assert '"b c d" (2 photos)' in lines and "as well" not in lines


def test_a_style_without_captions_is_remarked_on(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    base, folders = base_of("sd1", "/m/a.safetensors"), find_photos(tmp_path)
    plan = Plan(order_of(base, "style", folders, Trigger("ink")), {}, captions=["ink"])
    assert any("learns what the photos show as well" in line for line in list_captions(plan))


@pytest.mark.parametrize(
    ("trigger", "remark"), [("photos", "usual word"), ("my cat on a red sofa", "sentence"), ("mycat, a cat", None)]
)
def test_a_trigger_that_is_hard_to_call_is_remarked_on_once(trigger: str, remark: str | None) -> None:
    remarks = list(remark_on_trigger(parse_trigger(trigger)))
    assert len(remarks) == bool(remark) and all(str(remark) in text and "mycat, a cat" in text for text in remarks)


def test_repeats_and_trigger_come_from_the_folders_of_sd_scripts(tmp_path: Path) -> None:
    KINDS["nested"](tmp_path)
    folders = find_photos(tmp_path)
    trigger = suggest_trigger(tmp_path, folders)
    assert trigger == Trigger("mycat", "cat")
    assert sorted(folder.describe(trigger)["num_repeats"] for folder in folders if folder.photos) == [1, 3]
    assert suggest_trigger(Path("/a/My photos (2)"), []) == Trigger("myphotos2")


def test_small_photos_are_trained_at_their_own_size(tmp_path: Path) -> None:
    recipe = choose_recipe(base_of("sdxl", "/m/a.safetensors"), "character")
    for side, expected in ((1600, 1024), (600, 1024), (300, 256)):
        folder = tmp_path / str(side)
        folder.mkdir()
        Image.new("RGB", (side, side)).save(folder / "a.png")
        base, photos = base_of("sdxl", "/m/a.safetensors"), find_photos(folder)
        assert choose_side(base, recipe.values, {}, photos) == expected
        assert choose_side(base, recipe.values, {"resolution": "768,768"}, photos) == 768


def test_the_marker_tensors_of_a_checkpoint_tell_its_prediction(tmp_path: Path) -> None:
    path = tmp_path / "noob.safetensors"
    save_file({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    marked = read_prediction(Base(str(path), path, base_of("sdxl", "x").spec, frozenset(("v_pred", "ztsnr"))))
    assert marked is not None and marked.values == {"v_parameterization": True, "zero_terminal_snr": True}
    save_file({"a": torch.zeros(1)}, path, {"modelspec.prediction_type": "epsilon"})
    told = read_prediction(Base(str(path), path, base_of("sdxl", "x").spec, frozenset(("a",))))
    assert told is not None and told.values == {"v_parameterization": False}


@pytest.mark.slow
def test_the_losses_of_a_trained_base_tell_that_it_predicts_noise(
    tmp_path: Path, fresh_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = diffusers.AutoencoderKL.encode
    monkeypatch.setattr(diffusers.AutoencoderKL, "encode", lambda vae, x: encoded.append(len(x)) or encode(vae, x))
    base, folders = recognise(TOY), find_photos(Path(HEARTS))
    recipe, trigger = choose_recipe(base, "character"), Trigger("heart")
    values = {**choose_values(recipe, 64, 32, 10), **base.values}
    plan = Plan(order_of(base, "character", folders, trigger), values, write_prompts(recipe, trigger, 64))
    plan.texts.write(files := Files(tmp_path, "mine"))
    measured = measure_prediction(base, partial(measure_losses, base, read_options(base, files)))
    assert measured.prediction == "epsilon" and "on 5 photos" in measured.why
    assert sum(encoded) == 5


def test_text_encoders_and_vaes_are_found_in_comfyuis_folders_by_content(tmp_path: Path) -> None:
    models = tmp_path / "models"
    words = BASES["flux"].build(models)
    files = dict(zip(words[::2], words[1::2], strict=True))
    for flag, folder, name in (
        ("--pretrained_model_name_or_path", "diffusion_models", "f.safetensors"),
        ("--clip_l", "text_encoders", "one.safetensors"),
        ("--t5xxl", "text_encoders", "clip_l.safetensors"),  # a misleading name
        ("--ae", "vae", "mine.safetensors"),
    ):
        (models / folder).mkdir(exist_ok=True)
        Path(files[flag]).rename(models / folder / name)
    for tokenizer in models.glob("tokenizer*"):
        tokenizer.rename(models / "diffusion_models" / tokenizer.name)
    base = recognise(str(models / "diffusion_models" / "f.safetensors"))
    parser = import_module(base.spec.script.removesuffix(".py")).setup_parser()
    options = base.spec.options.from_args(parser.parse_args(["--pretrained_model_name_or_path", base.name]))
    found = find_parts(base, options, None)
    assert {flag: Path(path).name for flag, path in found.items()} == {
        "clip_l": "one.safetensors",
        "t5xxl": "clip_l.safetensors",
        "ae": "mine.safetensors",
    }
    (models / "vae" / "mine.safetensors").unlink()
    with pytest.raises(UserError, match=r"--ae is missing.*--models.*ae\.safetensors of .* \(0\.34 GB"):
        find_parts(base, options, None)


def write_adapter(path: Path, base: Base) -> Path:
    """Write an adapter whose metadata name its base model."""
    path.parent.mkdir(exist_ok=True)
    module = "diffusion_model.layers.0.attention.to_q" if base.spec.name == "zimage" else "lora_unet_x"
    tensors = {f"{module}.lora_A.weight": torch.zeros(2, 3840), f"{module}.lora_B.weight": torch.zeros(3840, 2)}
    save_file(
        tensors, path, {"modelspec.architecture": base.spec.adapter_metadata("", False)["modelspec.architecture"]}
    )
    return path


def test_a_step_distilled_base_takes_its_training_adapter_beside_it_or_of_the_models(tmp_path: Path) -> None:
    (tmp_path / "diffusion_models").mkdir()
    path = tmp_path / "diffusion_models" / "z_image_turbo_bf16.safetensors"
    base = Base(str(path), path, base_of("zimage", "x").spec, {})
    published, found = find_training_adapter(base, {}, tmp_path)
    assert published is not None and found is None and "ostris/zimage_turbo_training_adapter" in str(published)
    write_adapter(tmp_path / "loras" / "my_cat.safetensors", base)
    (tmp_path / "loras" / "other_training_adapter.safetensors").write_bytes(b"damaged")
    assert find_training_adapter(base, {}, tmp_path)[1] is None
    adapter = write_adapter(tmp_path / "loras" / "zimage_turbo_training_adapter_v1.safetensors", base)
    assert find_training_adapter(base, {}, tmp_path)[1] == adapter
    for given in ({"training_adapter": "none"}, {"base_weights": ["a"]}, {"model_version": "de-turbo"}):
        assert find_training_adapter(base, given, tmp_path) == (None, None)


def test_parts_and_adapters_are_listed_and_not_what_is_unset() -> None:
    base = base_of("flux", "/m/a.safetensors")
    values = {"ae": "/m/ae", "clip_l": None, "training_adapter": "none", "base_weights": ["/m/b"], "output_dir": "/o"}
    plan = Plan(order_of(base, "style", [], Trigger("ink")), values)
    assert list_part_names(plan) == ["ae", "base_weights"]


def test_a_pipeline_without_a_family_is_recognised(tmp_path: Path) -> None:
    base = recognise(build_base(GENERIC, tmp_path))
    assert base.spec.script == "diffusers_train_network.py" and base.title == GENERIC


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["no_such_folder", "--base", TOY], "is no folder"),
        (["configs/leco", "--base", TOY], "has no photos that can be read"),
        ([HEARTS, "--base", "no.safetensors"], "--base no.safetensors does not exist"),
        ([HEARTS, "--base", TOY, "--steps", "0"], "--steps is 0"),
        ([HEARTS, "--base", TOY, "--trigger", ", a cat"], "has no word"),
        ([HEARTS, "--base", TOY, "--dataset_config", "x.toml"], "--dataset_config is no option of train.py"),
        ([HEARTS, "--base", TOY, "--max_train_steps", "5"], "give --steps or --minutes"),
    ],
)
def test_a_mistake_is_named_before_any_work(words: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*words, "--yes"]) == 1
    assert error in capsys.readouterr().err


def test_steps_and_minutes_exclude_each_other() -> None:
    with pytest.raises(SystemExit):
        train.main([HEARTS, "--base", TOY, "--steps", "5", "--minutes", "5"])


WORDS: list[list[str]] = [
    ["--base", TOY],
    ["--learning_rate", "5e-5"],
    ["--network_args", "conv_dim=4", "conv_alpha=1"],
    ["--flip_aug"],
    ["--steps", "7"],
    ["--min_snr_gamma=5"],
]


@pytest.mark.parametrize("order", range(len(WORDS)))
def test_any_option_of_the_script_is_read_in_any_order(order: int) -> None:
    groups = [*WORDS[order:], *WORDS[:order]]
    flag = next(i for i, words in enumerate(groups) if words[0] == "--flip_aug")
    groups[flag + 1 : flag + 1] = [[HEARTS]]
    words = [word for group in groups for word in group]
    args, base, given = read_command_line(train.add_options, train.setup_parser(), words)
    assert (args.photos, args.steps, args.minutes, base.spec.script) == (Path(HEARTS), 7, None, "train_network.py")
    assert given == {
        "learning_rate": 5e-5,
        "network_args": ["conv_dim=4", "conv_alpha=1"],
        "flip_aug": True,
        "min_snr_gamma": 5.0,
    }


@pytest.mark.parametrize("word", ["--learning_rat", "--step"])
def test_options_are_not_abbreviated(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main([HEARTS, "--base", TOY, word, "5"])
    assert f"unrecognized arguments: {word}" in capsys.readouterr().err


def test_what_the_user_overrides_is_shown_with_what_the_recipe_has() -> None:
    text = describe_given({"learning_rate": 5e-5, "flip_aug": True}, {"learning_rate": 1e-4})
    assert text == "--learning_rate 5e-05, the recipe has 0.0001; --flip_aug True"


def test_names_of_photos_cannot_steer_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("library.train_photos.session.train", lambda plan, start, record: 0)
    KINDS["alpha"](tmp_path)
    (tmp_path / "\x1b]0;title\x07.jpg").write_bytes(b"no picture")
    words = [str(tmp_path), "--base", TOY, "--trigger", "heart", "--steps", "9", "--yes", "--output_dir"]
    assert train.main([*words, str(tmp_path / "\x1b[31mred")]) == 0
    printed = capsys.readouterr().out
    assert "left out: \\x1b]0;title\\x07.jpg" in printed and "\\x1b[31mred" in printed and "\x1b" not in printed
