"""A training TOML becomes a study: every key is set, left with a reason, or without effect."""

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from lyco_lab import cli
from lyco_lab.config import load_study
from lyco_lab.errors import UserError
from lyco_lab.import_config import import_config, read, translate
from lyco_lab.import_config.keys import Keys
from lyco_lab.import_config.known import HARMLESS, READ, UNSUPPORTED

PAPER = """
[model]
pretrained_model_name_or_path = "/models/v1-5-pruned.ckpt"
[network]
network_module = "lycoris.kohya"
network_dim = 8
network_alpha = 4
network_args = ["preset=attn-mlp", "algo=lora", "conv_dim=8", "conv_alpha=4"]
network_dropout = 0
[optimizer]
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.1", "betas=0.9,0.99"]
learning_rate = 5e-4
unet_lr = 5e-4
text_encoder_lr = 5e-4
lr_scheduler = "constant_with_warmup"
lr_warmup_steps = 3500
max_grad_norm = 1
[training]
train_batch_size = 8
gradient_accumulation_steps = 1
gradient_checkpointing = false
max_train_steps = 10000
max_train_epochs = 50
save_every_n_epochs = 5
save_precision = "fp16"
mixed_precision = "bf16"
xformers = true
seed = 23
[images]
train_data_dir = "/pictures"
resolution = 512
enable_bucket = true
min_bucket_reso = 320
max_bucket_reso = 960
bucket_reso_steps = 64
cache_latents = true
flip_aug = false
color_aug = false
caption_extension = ".txt"
caption_dropout_rate = 0.05
shuffle_caption = false
max_token_length = 150
clip_skip = 1
output_name = "exp-a"
"""
LEAST = {
    "pretrained_model_name_or_path": "m",
    "network_module": "networks.lora",
    "train_data_dir": "p",
    "resolution": 512,
}


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "training.toml"
        path.write_text(text)
        return path

    return write


def keys_of(tmp_path, **more) -> Keys:
    keys = Keys(tmp_path / "training.toml", LEAST | more)
    translate(keys)
    return keys


def values(keys: Keys) -> dict:
    return {ours: value for ours, (value, _) in keys.settings.items()}


def run_of(file, tmp_path, **more):
    lines = [f"{key} = {_toml(value)}" for key, value in (LEAST | more).items()]
    made = import_config(file("\n".join(lines)), tmp_path / "study")
    return made.study.runs[0]


def _toml(value) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def test_the_papers_recipe(file, tmp_path):
    made = import_config(file(PAPER), tmp_path / "paper", epoch_steps=695)
    (run,) = load_study(tmp_path / "paper").runs
    assert run == made.study.runs[0]
    assert run.seed == 23
    assert run.adapter["kind"] == "lora"
    assert (run.adapter["rank"], run.adapter["alpha"]) == (8, 4.0)
    assert run.optimizer == {
        "kind": "adamw8bit", "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1
    }  # fmt: skip
    train, data, model = run.train, run.data, run.model
    assert (train.lr, train.text_encoder_lr, train.grad_clip) == (5e-4, None, 1.0)
    assert (train.schedule, train.warmup_steps, train.steps) == ("constant", 3500, 34750)
    assert (train.batch_size, train.caption_dropout) == (8, 0.05)
    assert (data.folder, data.resolution, data.buckets) == ("/pictures", 512, (320, 960, 64))
    assert (data.caption_extension, data.flip, data.shuffle_tags) == (".txt", False, False)
    assert (model.path, model.preset) == ("/models/v1-5-pruned.ckpt", "attn-mlp")
    assert (model.precision, model.text_encoder, model.clip_skip) == ("bf16", True, 1)
    assert model.max_token_length == 150
    assert set(made.left) == {"save_every_n_epochs"}


def test_every_key_of_the_paper_is_accounted_for(file, tmp_path):
    keys = read(file(PAPER))
    translate(keys, 695)
    assert set(keys.values) <= keys.used | set(keys.left) | set(keys.idle)
    assert {"xformers", "save_precision", "max_train_steps"} <= set(keys.idle)
    import_config(file(PAPER), tmp_path / "s", 695)
    text = (tmp_path / "s" / "study.yaml").read_text()
    assert "lr: 0.0005 # unet_lr" in text
    assert "max_token_length: 150" in text


def test_without_images_epochs_are_not_guessed(file, tmp_path):
    made = import_config(file(PAPER), tmp_path / "s")
    assert made.study.runs[0].train.steps == 10000
    assert "--epoch-steps" in made.left["max_train_epochs"]


def test_images_that_are_here_are_counted(file, tmp_path):
    folder = tmp_path / "pictures" / "3_cat"
    folder.mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (512, 512)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a cat")
    text = PAPER.replace("/pictures", str(folder.parent)).replace("= 3500", "= 5")
    made = import_config(file(text.replace("batch_size = 8", "batch_size = 2")), tmp_path / "s")
    assert made.study.runs[0].train.steps == 50 * 2 * 3 // 2


def test_what_is_not_said_has_their_default(file, tmp_path):
    run = run_of(file, tmp_path)
    assert (run.train.batch_size, run.train.lr, run.train.steps) == (1, 2e-6, 1600)
    assert (run.train.warmup_steps, run.train.caption_dropout) == (0, 0.0)
    assert run.optimizer["kind"] == "adamw"
    assert run.optimizer["betas"] == (0.9, 0.999)
    assert (run.adapter["rank"], run.adapter["alpha"]) == (4, 1.0)
    assert run.data.caption_extension == ".caption"
    assert run.model.text_encoder
    assert run.model.precision == "fp32"


ALGORITHMS = [
    (["algo=loha", "preset=full", "use_tucker=True", "conv_dim=2"],
     {"kind": "loha", "tucker": True, "conv_rank": 2}),
    (["algo=lokr", "factor=8", "decompose_both=True"],
     {"kind": "lokr", "factor": 8, "decompose_both": True}),
    (["algo=lokr", "full_matrix=True"], {"kind": "lokr", "factor": 10000, "full_matrix": True}),
    (["algo=full"], {"kind": "native"}),
    (["algo=ia3"], {"kind": "ia3"}),
    (["algo=glora"], {"kind": "glora", "rank": 4}),
    (["algo=dylora", "block_size=2"], {"kind": "dylora", "block_size": 2}),
    (["algo=diag-oft", "constraint=0.1"], {"kind": "oft", "block_size": 4, "constraint": 0.1}),
    (["algo=boft", "rescaled=True"], {"kind": "boft", "rescaled": True}),
    (["algo=locon", "rs_lora=True"], {"kind": "lora", "rank_stabilised": True}),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "expected"), ALGORITHMS, ids=lambda a: str(a)[:30])
def test_algorithms(file, tmp_path, arguments, expected):
    run = run_of(
        file, tmp_path, network_module="lycoris.kohya", network_args=arguments, network_dim=4
    )
    assert expected.items() <= run.adapter.items()


def test_dora_has_the_other_within(file, tmp_path):
    run = run_of(
        file, tmp_path, network_module="lycoris.kohya", network_args=["dora_wd=True", "algo=loha"]
    )
    assert (run.adapter["kind"], run.adapter["axis"]) == ("dora", "out")
    assert (run.adapter["of"]["kind"], run.adapter["of"]["rank"]) == ("loha", 4)


def test_the_schedules(file, tmp_path):
    keys = keys_of(tmp_path, lr_scheduler="cosine_with_restarts", lr_scheduler_num_cycles=3)
    assert values(keys)["train.schedule_restarts"] == 2
    keys = keys_of(tmp_path, lr_scheduler="cosine_with_restarts")
    assert values(keys)["train.schedule"] == "cosine"
    keys = keys_of(tmp_path, lr_scheduler="polynomial", learning_rate=1e-4)
    assert values(keys)["train.schedule_end"] == pytest.approx(1e-3)
    keys = keys_of(tmp_path, lr_scheduler="cosine", lr_warmup_steps=0.1)
    assert values(keys)["train.warmup_steps"] == 160
    keys = keys_of(tmp_path, lr_warmup_steps=100)
    assert values(keys)["train.warmup_steps"] == 0
    assert "lr_warmup_steps" in keys.idle


def test_rates(tmp_path):
    assert (
        values(keys_of(tmp_path, unet_lr=1e-4, text_encoder_lr=5e-5))["train.text_encoder_lr"]
        == 5e-5
    )
    found = values(keys_of(tmp_path, learning_rate=1e-3, unet_lr=1e-4))
    assert (found["train.lr"], found["train.text_encoder_lr"]) == (1e-4, 1e-3)
    for more in ({"text_encoder_lr": 0.0}, {"network_train_unet_only": True}):
        assert values(keys_of(tmp_path, **more))["model.text_encoder"] is False
    assert values(keys_of(tmp_path, max_grad_norm=0))["train.grad_clip"] is None


def test_validation(file, tmp_path):
    run = run_of(file, tmp_path, validation_split=0.1, validate_every_n_steps=100)
    assert (run.train.validation_share, run.train.validate_every) == (0.1, 100)
    assert "validation_split" in keys_of(tmp_path, validation_split=0.1).left
    assert "validate_every_n_steps" in keys_of(tmp_path, validate_every_n_steps=100).idle


def test_a_dataset_of_its_own(file, tmp_path):
    run = run_of(file, tmp_path, dataset_config="data.toml", shuffle_caption=True)
    assert (run.data.toml, run.data.folder) == ("data.toml", None)
    left = keys_of(tmp_path, dataset_config="d.toml", shuffle_caption=True).left
    assert "[general] of d.toml" in left["shuffle_caption"]


def test_noise_prior_images_and_the_rest(file, tmp_path):
    run = run_of(
        file, tmp_path, noise_offset=0.1, min_snr_gamma=5.0, ip_noise_gamma=0.05, clip_skip=2,
        gradient_accumulation_steps=4, gradient_checkpointing=True, reg_data_dir="reg",
        prior_loss_weight=0.5, shuffle_caption=True, keep_tokens=1, scale_weight_norms=1.0,
        network_dropout=0.2, v_parameterization=True, zero_terminal_snr=True,
    )  # fmt: skip
    train, data = run.train, run.data
    assert (train.noise_offset, train.min_snr_gamma, train.input_perturbation) == (0.1, 5.0, 0.05)
    assert (train.accumulate, train.gradient_checkpointing) == (4, True)
    assert (data.prior, data.prior_weight, data.shuffle_tags, data.keep_tags) == (
        "reg",
        0.5,
        True,
        1,
    )
    assert (run.options.max_norm, run.options.dropout) == (1.0, 0.2)
    assert (run.model.prediction, run.model.zero_terminal_snr) == ("v_prediction", True)
    assert run.model.clip_skip == 2


@pytest.mark.parametrize("tokens", [None, 75, 150, 225])
def test_captions_may_be_of_several_windows(file, tmp_path, tokens):
    asked = {} if tokens is None else {"max_token_length": tokens}
    assert run_of(file, tmp_path, **asked).model.max_token_length == tokens


def test_captions_of_a_part_of_a_window_are_refused(tmp_path):
    with pytest.raises(UserError, match="max_token_length is 100, needs 75, 150 or 225"):
        keys_of(tmp_path, max_token_length=100)


@pytest.mark.parametrize(
    ("preset", "norms"), [("full", True), ("attn-mlp", True), ("attn-only", False)]
)
def test_norms_beside_the_adapter(file, tmp_path, preset, norms):
    arguments = ["algo=loha", "train_norm=True", f"preset={preset}"]
    asked = {"network_module": "lycoris.kohya", "network_args": arguments}
    assert run_of(file, tmp_path, **asked).model.train_norm is norms
    keys = keys_of(tmp_path, **asked)
    assert ("network_args train_norm" in keys.idle) is not norms  # LyCORIS finds none there
    assert "network_args train_norm" not in keys.left


@given(key=st.sampled_from(READ), place=st.integers(0, 20), letter=st.sampled_from("xqz"))
def test_an_unknown_key_names_the_nearest(tmp_path_factory, key, place, letter):
    place = min(place, len(key))
    typo = key[:place] + letter + key[place:]
    left = keys_of(tmp_path_factory.getbasetemp(), **{typo: 1}).left
    assert re.search(r"not known \(did you mean '\w+'\?\)", left[typo])


@given(key=st.sampled_from(sorted(UNSUPPORTED)))
def test_what_is_not_supported_is_left_with_a_reason(tmp_path_factory, key):
    asked = keys_of(tmp_path_factory.getbasetemp(), **{key: "something"})
    assert len(asked.left[key]) > 5
    for inert in UNSUPPORTED[key][0]:
        found = keys_of(tmp_path_factory.getbasetemp(), **{key: inert})
        assert key in found.idle
        assert key not in found.left


def test_no_table_knows_what_another_reads():
    tables = [set(HARMLESS), set(UNSUPPORTED), set(READ)]
    assert sum(map(len, tables)) == len(set().union(*tables))


def test_secrets_are_not_written(file, tmp_path):
    run_of(file, tmp_path, wandb_api_key="s3cret", huggingface_token="s3cret")
    assert "s3cret" not in (tmp_path / "study" / "study.yaml").read_text()


BAD = [
    ("", "is empty"),
    ("a = ", "not valid TOML"),
    ("[[datasets]]\nresolution = 512", "data.toml="),
    ("learning_rate = 1\n[x]\nlearning_rate = 2", "gives learning_rate twice"),
    ("network_module = 'networks.lora'", "pretrained_model_name_or_path"),
    ("pretrained_model_name_or_path = 'm'", "trains no adapter"),
    ("pretrained_model_name_or_path='m'\nnetwork_module='networks.lara'",
     "did you mean 'networks.lora'"),
]  # fmt: skip
WRONG = [
    ({"train_batch_size": "many"}, "train_batch_size is 'many', needs a number"),
    ({"train_batch_size": 1.5}, "train_batch_size is 1.5, needs a whole number"),
    ({"flip_aug": 1}, "flip_aug is 1, needs true or false"),
    ({"resolution": "big"}, "resolution is 'big'"),
    ({"optimizer_type": "Adamm"}, "did you mean 'adam"),
    ({"optimizer_args": ["betas"]}, "needs name=value"),
    ({"lr_warmup_steps": 2000, "lr_scheduler": "cosine"}, "there are 1600 steps"),
    ({"network_module": "lycoris.kohya", "network_args": ["algo=lokrr"]}, "did you mean 'lokr'"),
    ({"noise_offset": 0.1, "multires_noise_iterations": 6}, "does not go together here"),
]


@pytest.mark.parametrize(("text", "said"), BAD)
def test_bad_files(file, tmp_path, text, said):
    with pytest.raises(UserError, match=re.escape(said)):
        import_config(file(text), tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(("more", "said"), WRONG, ids=lambda x: str(x)[:40])
def test_bad_values(file, tmp_path, more, said):
    with pytest.raises(UserError, match=re.escape(said)):
        run_of(file, tmp_path, **more)
    assert not (tmp_path / "study").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_study_is_never_written_over(file, tmp_path):
    run_of(file, tmp_path)
    before = (tmp_path / "study" / "study.yaml").read_text()
    with pytest.raises(UserError, match="has a study.yaml already"):
        run_of(file, tmp_path, seed=7)
    assert (tmp_path / "study" / "study.yaml").read_text() == before


def test_the_command(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["import-config", str(file(PAPER)), "--epoch-steps", "695"])
    assert done.exit_code == 0
    assert "lyco-lab run exp-a --dry-run" in done.output
    assert "save_every_n_epochs: " in done.output
    assert load_study(tmp_path / "exp-a").runs[0].train.steps == 34750
    again = CliRunner().invoke(cli.app, ["import-config", str(file(PAPER))])
    assert again.exit_code == 2


def test_a_mark_in_front_and_what_looks_like_a_reference(tmp_path, file):
    odd = "\\${oc.env:HOME} # 010" + "x " * 900
    lines = [f"{key} = {_toml(value)}" for key, value in (LEAST | {"output_name": "m"}).items()]
    text = "\n".join([*lines, f"caption_prefix = {json.dumps(odd)}"])
    path = file("")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    (run,) = import_config(path, tmp_path / "study").study.runs
    assert run.data.prefix == odd + " "


@pytest.mark.parametrize(
    "given",
    [
        {"network_dim": math.inf}, {"network_dim": 1e300}, {"seed": math.nan},
        {"network_args": ["conv_dim=inf"]}, {"network_args": ["conv_dim=nan"]},
        {"learning_rate": 1e31}, {"max_train_steps": 10**20},
    ],
)  # fmt: skip
def test_numbers_that_are_none_are_refused(tmp_path, file, given):
    ((key, value),) = given.items()
    name = value[0].partition("=")[0] if isinstance(value, list) else key
    with pytest.raises(UserError, match=f"{name}|train.steps"):
        run_of(file, tmp_path, **given)
