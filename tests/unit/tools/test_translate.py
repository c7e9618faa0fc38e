"""tools/translate.py, and --config_file of another trainer's file."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import toml
import torch
from safetensors.torch import save_file

from library.base.errors import UserError
from library.options.output.prompts import read_prompts, walk_seeds
from library.translation.reading import read_configuration
from library.translation.shell import read_commands
from library.translation.translating import Translation, translate
from tests.contracts.other_trainers import find_example
from tools.translate import main

ROOT = Path(__file__).parents[3]


def of_text(folder: Path, name: str, text: str) -> Translation:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    configuration = read_configuration(path, "config")
    assert configuration is not None
    return translate(configuration)


def missing_names(translation: Translation) -> set[str]:
    return {outcome.name for outcome in translation.missing}


def test_every_line_says_where_it_comes_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = find_example("ostris/ai-toolkit", "lora_flux_24gb").write(tmp_path), tmp_path / "my cat.toml"
    assert main([str(source), "-o", str(output)]) == 0
    lines = output.read_text(encoding="utf-8").splitlines()
    options = [line for line in lines if line and not line.startswith("#")]
    assert len(options) > 25 and all("  # " in line for line in options)
    values, dataset = toml.loads("\n".join(lines)), toml.loads((tmp_path / "my cat-dataset.toml").read_text())
    assert [table["resolution"] for table in dataset["datasets"]] == [512, 768, 1024]
    assert values["learning_rate"] == 1e-4 and values["save_last_n_steps"] == 4 * 250
    assert "--seed" not in values and "eps=1e-06" in values["optimizer_args"]
    assert "To train: python3 flux_train_network.py --config_file" in capsys.readouterr().out


def test_the_suffix_of_a_file_says_nothing(tmp_path: Path) -> None:
    example = find_example("Nerogar/OneTrainer", "sdxl 1.0")
    assert of_text(tmp_path, "a.txt", json.dumps(example.content)).title == "OneTrainer"
    assert of_text(tmp_path, "b.json", find_example("cocktailpeanut/fluxgym", "20G").render_command()).options


def test_shell_text_is_read_without_a_shell(tmp_path: Path) -> None:
    text = f"""
# python train_network.py --seed 1
touch {tmp_path}/run; export MODEL="base dir/model.safetensors"
OUT=out$(touch {tmp_path}/substituted)
accelerate launch --num_processes 2 sd-scripts/sdxl_train_network.py \\
  --pretrained_model_name_or_path=$MODEL --output_dir ${{WHERE}} --network_args "conv_dim=4" "algo=lora" --sdpa
"""
    [command] = read_commands(text)
    options = dict(command.options)
    assert command.script == "sdxl_train_network.py" and command.unknown_variables == ("WHERE",)
    assert options["pretrained_model_name_or_path"] == "base dir/model.safetensors"
    assert options["network_args"] == ["conv_dim=4", "algo=lora"] and options["sdpa"] is True
    translation = of_text(tmp_path, "train.sh", text)
    assert any("--num_processes 2" in remark for remark in translation.remarks)
    assert not (tmp_path / "run").exists() and not (tmp_path / "substituted").exists()


def test_a_batch_file_keeps_its_backslashes() -> None:
    text = 'set OUT=C:\\loras\\my cat\npython train_network.py ^\r\n --output_dir "%OUT%" --train_data_dir D:\\cats\n'
    [command] = read_commands(text)
    assert dict(command.options) == {"output_dir": "C:\\loras\\my cat", "train_data_dir": "D:\\cats"}


def test_yaml_builds_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"config: !!python/object/apply:os.system ['touch {tmp_path}/run']\n")
    assert read_configuration(path, "config") is None and not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["train: {wibble: *a11}", "datasets: [{resolution: *a11}]", "train: *a11"])
def test_repeated_aliases_end_with_an_error(place: str, tmp_path: Path) -> None:
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))
    path = tmp_path / "config.yaml"
    path.write_text(f"a0: &a0 {{k: 1}}\n{levels}\nconfig: {{process: [{{type: sd_trainer, {place}}}]}}\n")
    with pytest.raises(UserError, match="more than 100000 values by its aliases"):
        read_configuration(path, "config")


def test_an_alias_inside_itself_ends_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("config: {process: [{type: sd_trainer, train: &a {steps: 5, wibble: [*a]}}]}\n")
    with pytest.raises(UserError, match="more than 100000 values by its aliases"):
        read_configuration(path, "config")


def test_an_alias_stands_for_its_value(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("size: &s [512, 768]\nconfig: {process: [{type: sd_trainer, datasets: [{resolution: *s}]}]}\n")
    found = read_configuration(path, "config")
    assert found is not None and [512, 768] in [setting.value for setting in found.settings]


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    torch.save({"lora": torch.zeros(1)}, tmp_path / "lora.pt")
    with pytest.raises(UserError, match="may run code"):
        read_configuration(tmp_path / "lora.pt", "config")


def test_an_unknown_version_says_so(tmp_path: Path) -> None:
    content = {**find_example("Nerogar/OneTrainer", "sdxl 1.0").content, "__version": 12, "brand_new": 3}
    translation = of_text(tmp_path, "a.json", json.dumps(content))
    assert any("version 12" in remark for remark in translation.remarks)
    assert "brand_new" in missing_names(translation)


def test_uploads_tokens_and_remote_code_are_never_taken_over(tmp_path: Path) -> None:
    command = "python train_dreambooth_lora_flux.py --push_to_hub --hub_model_id me/cat --hub_token hf_secret --rank 8"
    translation = of_text(tmp_path, "a.sh", command)
    other = of_text(
        tmp_path, "b.sh", "python train_network.py --huggingface_repo_id me/cat --huggingface_token hf_secret"
    )
    remote = of_text(tmp_path, "c.json", json.dumps({"model_family": "sdxl", "trust_remote_code": True}))
    assert missing_names(translation) == {"push_to_hub", "hub_model_id", "hub_token"}
    assert missing_names(other) == {"huggingface_repo_id", "huggingface_token"}
    assert missing_names(remote) == {"trust_remote_code"}
    for found in (translation, other, remote):
        assert not any("huggingface" in name or "trust" in name for name in found.options)


def test_previews_have_the_seeds_of_ai_toolkit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = find_example("ostris/ai-toolkit", "lora_flux_24gb")
    sample = {"prompts": [], "samples": [{"prompt": "a"}, {"prompt": "b", "seed": 0}, {"prompt": "c"}]}
    content = copy.deepcopy(example.content)
    content["config"]["process"][0]["sample"] |= sample
    example = replace(example, content=content)
    assert main([str(example.write(tmp_path)), "-o", str(tmp_path / "own.toml")]) == 0
    assert toml.loads((tmp_path / "own.toml").read_text())["walk_seed"] is True
    specs = walk_seeds(read_prompts(tmp_path / "own-prompts.txt"))
    assert [spec.seed for spec in specs] == [42, 0, 44]  # jobs/process/BaseSDTrainProcess.py:301 and 337


LORA_EASY = """
[[subsets]]
name = "subset 1"
image_dir = "photos/cat"
num_repeats = 2
caption_extension = ".txt"
keep_tokens = 0
shuffle_caption = true

[train_mode]
train_mode = "lora"

[general_args.args]
pretrained_model_name_or_path = "base.safetensors"
sdxl = true
mixed_precision = "bf16"
seed = 23
max_train_epochs = 10
[general_args.dataset_args]
resolution = [1024, 768]
batch_size = 2

[network_args.args]
network_dim = 16
network_alpha = 8.0
[network_args.args.network_args]
conv_dim = 4
algo = "locon"

[optimizer_args.args]
optimizer_type = "AdamW8bit"
lr_scheduler = "cosine"
learning_rate = 0.0001
warmup_ratio = 0.1
[optimizer_args.args.optimizer_args]
weight_decay = "0.1"

[saving_args.args]
output_dir = "out"
output_name = "my_${replace}"
easy_name = "cat"
save_toml = true

[bucket_args.dataset_args]
enable_bucket = true
min_bucket_reso = 256
"""


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_the_toml_of_lora_easy_training_scripts(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flux = LORA_EASY.replace("sdxl = true\n", "") + "[flux_args.args]\nguidance_scale = 3.5\n"
    (tmp_path / "easy.toml").write_text(LORA_EASY if family == "sdxl" else flux.replace('algo = "locon"\n', ""))
    assert main([str(tmp_path / "easy.toml"), "-o", str(tmp_path / "own.toml")]) == 0
    out = capsys.readouterr().out
    assert "0 without an equal" in out and f"python3 {family}_train_network.py" in out
    options, data = (toml.loads((tmp_path / f"own{end}.toml").read_text()) for end in ("", "-dataset"))
    expected = {"network_args": ["conv_dim=4", "algo=locon"], "network_module": "lycoris.kohya"}
    if family == "flux":
        expected = {"network_args": ["conv_dim=4"], "network_module": "networks.lora", "guidance_scale": 3.5}
    expected |= {"output_name": "my_cat", "optimizer_args": ["weight_decay=0.1"], "lr_warmup_steps": 0.1, "seed": 23}
    assert {name: options.get(name) for name in expected} == expected
    (dataset,) = data["datasets"]
    (subset,) = dataset["subsets"]
    keys = {**data.get("general", {}), **dataset, **subset}
    assert (keys["resolution"], keys["batch_size"], keys["min_bucket_reso"]) == ([1024, 768], 2, 256)
    assert (keys["image_dir"], keys["num_repeats"], keys["shuffle_caption"]) == ("photos/cat", 2, True)
    assert "keep_tokens" not in keys


def test_class_images_are_a_subset_of_their_own(tmp_path: Path) -> None:
    command = (
        "python train_dreambooth_lora_sdxl.py --instance_data_dir cats --instance_prompt 'a sks cat' "
        "--with_prior_preservation --class_data_dir all --class_prompt 'a cat' --prior_loss_weight 0.5"
    )
    first, second = of_text(tmp_path, "a.sh", command).datasets
    assert first["class_tokens"].value == "a sks cat" and "is_reg" not in first
    assert second["image_dir"].value == "all" and second["is_reg"].value is True


def test_an_adapter_says_how_it_was_trained(tmp_path: Path) -> None:
    metadata = {
        "ss_base_model_version": "sdxl_base_v1-0", "ss_network_dim": "8", "ss_network_alpha": "4.0",
        "ss_network_module": "networks.lora", "ss_learning_rate": "0.0002", "ss_resolution": "(1024, 1024)",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)", "ss_network_args": '{"conv_dim": "4"}',
        "ss_unet_lr": "None", "ss_cache_latents": "False",
    }  # fmt: skip
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(8, 4)}, tmp_path / "a.safetensors", metadata)
    configuration = read_configuration(tmp_path / "a.safetensors", "config")
    assert configuration is not None
    translation = translate(configuration)
    assert translation.script == "sdxl_train_network.py" and not translation.missing
    assert translation.values == {
        "network_dim": 8, "network_alpha": 4.0, "network_module": "networks.lora", "learning_rate": 0.0002,
        "resolution": "1024,1024", "optimizer_type": "torch.optim.adamw.AdamW", "optimizer_args": ["weight_decay=0.1"],
        "network_args": ["conv_dim=4"],
    }  # fmt: skip


@pytest.mark.parametrize("key", ["ot_config", "lora_adapter_metadata"])
def test_adapters_of_onetrainer_and_diffusers_are_read(tmp_path: Path, key: str) -> None:
    content = {"ot_config": {"training_method": "LORA", "model_type": "FLUX_DEV_1", "lora_rank": 8, "lora_alpha": 8.0},
               "lora_adapter_metadata": {"transformer.r": 8, "transformer.lora_alpha": 8}}[key]  # fmt: skip
    save_file({"a.lora_A.weight": torch.zeros(8, 4)}, tmp_path / "a.safetensors", {key: json.dumps(content)})
    configuration = read_configuration(tmp_path / "a.safetensors", "config")
    assert configuration is not None
    values = translate(configuration).values
    assert (values["network_dim"], float(values["network_alpha"])) == (8, 8.0)


def test_a_file_that_it_did_not_write_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = find_example("Nerogar/OneTrainer", "sdxl 1.0").write(tmp_path)
    (tmp_path / "mine-dataset.toml").write_text("mine")
    assert main([str(source), "-o", str(tmp_path / "mine.toml")]) == 1
    assert not (tmp_path / "mine.toml").exists() and (tmp_path / "mine-dataset.toml").read_text() == "mine"
    assert "would be lost" in capsys.readouterr().err
    (tmp_path / "mine-dataset.toml").unlink()
    assert main([str(source), "-o", str(tmp_path / "mine.toml")]) == 0
    assert main([str(source), "-o", str(tmp_path / "mine.toml")]) == 0  # its own files, unchanged


def test_a_file_of_nobody_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "poem.txt").write_text("roses are red")
    assert main([str(tmp_path / "poem.txt")]) == 1
    assert "is no configuration of ai-toolkit" in capsys.readouterr().err


def test_config_file_shows_another_trainers_file_and_ends(tmp_path: Path) -> None:
    source = find_example("ostris/ai-toolkit", "lora_flux_24gb").write(tmp_path)
    command = [sys.executable, str(ROOT / "flux_train_network.py"), "--config_file", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, input="y\n")
    assert done.returncode == 2 and "--yes trains with these options" in done.stderr
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "RANK": "1"})
    assert (second.returncode, second.stdout, second.stderr) == (2, "", "")  # the first process says it for all
    assert "network_dim = 16" in done.stdout and "0 without an equal" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [source.name]
    other = [sys.executable, str(ROOT / "sdxl_train_network.py"), "--config_file", str(source), "--yes"]
    done = subprocess.run(other, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "is for flux_train_network.py, not for sdxl_train_network.py" in done.stderr


def test_a_bare_name_is_still_that_of_a_toml_file(tmp_path: Path) -> None:
    from library.training.config_file import is_foreign

    (tmp_path / "run").write_text("a folder's note")
    assert is_foreign(str(tmp_path / "run"))
    (tmp_path / "run.toml").write_text("seed = 1")
    assert not is_foreign(str(tmp_path / "run")) and not is_foreign(str(tmp_path / "other"))
    assert not is_foreign(str(tmp_path / "run.toml"))


KOHYA_SS = {"LoRA_type": "LyCORIS/LoHa", "conv_dim": 8, "conv_alpha": 4, "use_cp": True, "network_dim": 32}


def test_the_layers_and_the_words_of_kohya_ss_are_kept(tmp_path: Path) -> None:
    more = {
        "optimizer_args": '"decouple=True" "betas=0.9,0.91"',
        "additional_parameters": "--min_timestep 5 --ip_noise_gamma=0.1",
    }
    values = of_text(tmp_path, "a.json", json.dumps({**KOHYA_SS, **more})).values
    assert {*values["network_args"]} == {"algo=loha", "conv_dim=8", "conv_alpha=4", "use_tucker=true"}
    assert values["optimizer_args"] == ["decouple=True", "betas=0.9,0.91"]
    assert (values["min_timestep"], values["ip_noise_gamma"]) == (5, 0.1)
    plain = of_text(tmp_path, "b.json", json.dumps({**KOHYA_SS, "LoRA_type": "Standard"})).values
    assert "network_args" not in plain  # its form has the fields, and Standard has no such layers


def test_the_lycoris_file_of_simpletuner_is_read(tmp_path: Path) -> None:
    own = {"model_family": "flux", "lora_type": "lycoris", "lora_rank": 8, "lycoris_config": "config/lokr.json"}
    missing = of_text(tmp_path, "a.json", json.dumps(own))
    assert "lycoris_config" in missing_names(missing) and "network_dim" not in missing.values
    (tmp_path / "lokr.json").write_text(
        '{"algo": "lokr", "linear_dim": 64, "linear_alpha": 2, "factor": 4, "multiplier": 1.0}'
    )
    values = of_text(tmp_path, "a.json", json.dumps(own)).values
    assert (values["network_module"], values["network_dim"], values["network_alpha"]) == ("lycoris.kohya", 64, 2)
    assert values["network_args"] == ["algo=lokr", "factor=4"] and "network_dropout" not in values


@pytest.mark.parametrize(("optimizer", "has"), [("prodigy", True), ("AdamW", False)])
def test_prodigy_is_that_of_diffusers(tmp_path: Path, optimizer: str, has: bool) -> None:
    command = f"accelerate launch train_dreambooth_lora_flux.py --optimizer={optimizer} --learning_rate 1"
    words = of_text(tmp_path, "a.sh", command).values["optimizer_args"]
    assert {"use_bias_correction=True", "safeguard_warmup=True"} <= {*words} if has else "safeguard" not in str(words)


def test_an_inpainting_model_of_onetrainer_is_trained_with_masks(tmp_path: Path) -> None:
    own = {"training_method": "LORA", "model_type": "STABLE_DIFFUSION_20_INPAINTING"}
    translation = of_text(tmp_path, "a.json", json.dumps(own))
    assert translation.values["v2"] and translation.values["train_inpainting"]
    assert "cache_latents_to_disk" not in translation.values
    assert not any("cache" in name for dataset in translation.datasets for name in dataset)


def test_a_slider_of_ai_toolkit_is_not_trained_on_images(tmp_path: Path) -> None:
    text = "config:\n  process:\n    - type: slider\n      slider: {targets: []}\n"
    with pytest.raises(UserError, match=r"process type slider.*train_leco\.py"):
        of_text(tmp_path, "a.yaml", text)


DREAMBOOTH = "accelerate launch train_dreambooth_lora_sdxl.py --dataset_name me/cats --instance_prompt 'a sks cat'"


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        (DREAMBOOTH, {"class_tokens": "a sks cat", "caption_column": ""}),
        (f"{DREAMBOOTH} --caption_column words", {"class_tokens": "a sks cat", "caption_column": "words"}),
        ("accelerate launch train_text_to_image_lora.py --dataset_name me/cats", {"caption_column": "text"}),
    ],
)
def test_a_data_set_of_the_hub_has_the_captions_that_diffusers_trains(
    tmp_path: Path, command: str, keys: dict[str, str]
) -> None:
    (dataset,) = of_text(tmp_path, "a.sh", command).datasets
    found = {name: line.value for name, line in dataset.items()}
    assert found["dataset_name"] == "me/cats" and "image_dir" not in found
    assert {name: found[name] for name in ("class_tokens", "caption_column") if name in found} == keys


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('D=8\nA=(--vae "$D"\n  # --seed 1\n  --seed 2)\npython train_network.py "${A[@]}"', {"vae": 8, "seed": 2}),
        ("python train_network.py --seed ${S:-7} --network_dim ${D:-16}", {"seed": 7, "network_dim": 16}),
        ("python train_network.py \\\r  --seed 3 \\\r  --network_dim 4\r", {"seed": 3, "network_dim": 4}),
        ("set /a N=4\r\npython train_network.py ^\r\n --seed=%N% --vae=%H%\\v", {"seed": 4, "vae": "%H%\\v"}),
        ("python train_network.py --seed 3 # --network_dim 4", {"seed": 3}),
    ],
)  # fmt: skip
def test_words_of_a_shell_are_read_as_it_reads_them(tmp_path: Path, text: str, values: dict[str, object]) -> None:
    assert of_text(tmp_path, "a.sh", text).values == values


@pytest.mark.parametrize("text", ['// mine\n{"training_method": "LORA"}', '{"training_method": "LO'])
def test_damaged_json_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="is no JSON, which it begins as"):
        of_text(tmp_path, "a.json", text)


@pytest.mark.parametrize("value", ["abc", [1, 2], {"a": 1}, True, "nan", "1e-4x", "1,2"])
def test_a_setting_of_numbers_is_not_given_what_is_none(value: object, tmp_path: Path) -> None:
    values = {"pretrained_model_name_or_path": "base", "output_name": "a", "train_data_dir": "images"}
    own = {**values, "LoRA_type": "Standard", "learning_rate": value, "bucket_reso_steps": value, "seed": "7"}
    translation = of_text(tmp_path, "config.json", json.dumps(own))
    assert missing_names(translation) == {"learning_rate", "bucket_reso_steps"}
    assert not {"learning_rate", "bucket_reso_steps"} & set(translation.values)
    assert all(str(value) in outcome.text or repr(value) in outcome.text for outcome in translation.missing)
    assert str(translation.values["seed"]) == "7"
