"""Options and config files: precedence, strict parsing and one-line errors."""

import re

import pytest
from pydantic import ValidationError

from cluster.errors import UserError
from train import cli
from train.config import Config, portable_options
from tune import cli as study_cli
from tune.cli import parse as parse_study


def test_options_override_the_config_file():
    parsed = cli.parse(["--optim.lr", "0.5", "--net.widths", "[8,16]", "--workers.num", "3"]).config
    assert parsed.name == "digits"
    assert (parsed.optim.lr, parsed.net.widths, parsed.workers.num) == (0.5, [8, 16], (3, 3))


@pytest.mark.parametrize("arguments", [["--storage", "/tmp/x"], ["--storage=/tmp/x"]])
def test_storage_has_a_short_form(arguments):
    assert cli.parse(arguments).config.storage.path == "/tmp/x"
    assert parse_study(arguments).storage.path == "/tmp/x"


def test_the_shipped_configs_are_valid():
    files = sorted(cli.CONFIGS.glob("*.yaml"))
    assert files
    for file in files:
        assert cli.parse(["--config", str(file)]).config.name == file.stem


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optim.rate", "1"], ["--optim.rate", "--help"]),
        (["--optim.lr", "fast"], ["optim.lr", "fast", "number"]),
        (["--net.widths", "[0]"], ["net.widths", "greater than or equal to 1"]),
        (
            ["--features", '{"image": {"kind": "image", "size": [0, 8]}}'],
            ["features.image.size", "greater than or equal to 1"],
        ),
        (["--optim.epochs", "0"], ["optim.epochs", "greater than or equal to 1"]),
        (["--data.valid_fraction", "0.9"], ["data.valid_fraction", "0.9", "less than 0.5"]),
        (["--precision", "fp64"], ["precision", "fp64", "bf16"]),
        (["--name", "a/../b"], ["name", "a/../b"]),
        (["--config", "missing.yaml"], ["missing.yaml", "No such file", "digits.yaml"]),
    ],
)
def test_the_error_names_a_wrong_option_and_accepted_values(arguments, words):
    with pytest.raises(UserError) as caught:
        cli.parse(arguments)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\ndata: {train: a}\nlearning: 1\n", ["learning", "optim"]),
        ("name: x\ndata: {train: a}\noptim: {rate: 1}\n", ["optim.rate", "lr, vector_lr"]),
        ("name: x\n", ["data", "missing"]),
        ("- 1\n", ["no options"]),
        ("a: [\n", ["not valid YAML"]),
    ],
)
def test_errors_in_a_config_file_are_explained_in_one_line(tmp_path, text, words):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        cli.parse(["--config", str(file)])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_workers_get_an_absolute_storage_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = cli.parse(["--storage", "runs", "--optim.lr", "0.5"]).config
    values = portable_options(config)
    monkeypatch.chdir("/")
    assert Config.model_validate(values).storage.root == str(tmp_path / "runs")
    assert config.storage.path == "runs"
    values["storage"]["path"] = "runs"
    assert Config.model_validate(values) == config


@pytest.mark.parametrize(
    ("parse_command", "common"), [(cli.parse, cli.COMMON), (parse_study, study_cli.COMMON)]
)
def test_help_begins_with_the_ten_common_options(parse_command, common, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_command(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    usage = shown.split("\n\n")[0]
    assert len(usage.splitlines()) == 1
    listed = re.findall(r"^  (--[\w.]+)", shown.split("\noptions:\n")[0], re.MULTILINE)
    assert len(listed) == len(common) == 10
    assert listed[:3] == list(common[:3])
    assert "(default: None)" not in shown


def test_a_config_is_named_after_its_training_file():
    assert Config(data={"train": "s3://bucket/My rides.csv"}).name == "my-rides"
    assert Config(data={"train": "table.csv"}, name="other").name == "other"
    with pytest.raises(ValidationError, match="name"):
        Config(data={"train": ""}, name="A b")


def test_a_config_file_is_loaded_or_named_in_one_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("name: rides\ndata: {train: rides.csv}\noptim: {epochs: 3}\n")
    assert Config.load(path).optim.epochs == 3
    path.write_text("name: rides\ndata: {train: rides.csv}\noptim: {epoch: 3}\n")
    with pytest.raises(UserError, match=r"unknown option 'optim\.epoch'"):
        Config.load(path)
    with pytest.raises(UserError, match="cannot be read"):
        Config.load(tmp_path / "missing.yaml")
