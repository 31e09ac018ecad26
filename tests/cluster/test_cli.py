"""Command lines: parsing of options, one-line error messages and exit codes."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from cluster.cli import CommandOptions, parse_options
from cluster.errors import UserError
from tests.server import REPOSITORY


class Options(CommandOptions):
    """Some options."""

    model_config = SettingsConfigDict(cli_prog_name="python -m some")

    name: CliPositionalArg[str]
    num_rows: int = Field(1, ge=1)
    header: list[str] = Field([])
    keep: list[str] = Field([])
    rate: float | None = None
    path: str | None = None


def parse(*argv: str) -> Options:
    return parse_options(Options, argv, verbatim=("--header",))


def test_options_are_read_from_the_command_line_alone(monkeypatch):
    monkeypatch.setenv("NAME", "environment")
    monkeypatch.setenv("RATE", "3")
    options = parse("digits", "--num-rows", "4", "--keep", "a,b", "--keep=c")
    assert options.model_dump() == {
        "name": "digits",
        "num_rows": 4,
        "header": [],
        "keep": ["a", "b", "c"],
        "rate": None,
        "path": None,
    }
    assert Options(name="x").path is None


@pytest.mark.parametrize("value", ["a,b", '["a"]', "Accept: a, b; q=0.5", "", "--header", "a=b"])
def test_a_verbatim_list_keeps_its_entries(value):
    options = parse("x", f"--header={value}", "--header", value)
    assert options.header == [value, value]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: NAME; 'python -m some --help' lists the"),
        (["x", "--num-row", "1"], "unrecognized arguments: --num-row 1; 'python -m some --help'"),
        (["x", "--num-rows", "0"], "option --num-rows: input should be greater than or equal to 1"),
        (["x", "--header"], "option --header: expected a value."),
        (["x", "--rate", "null"], "option --rate: input should be a valid number"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option(argv, message):
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_null_is_an_ordinary_string():
    assert parse("x", "--path", "null").path == "null"


def commands() -> list[str]:
    """Return the paths of all commands: modules that pass their `main` to run_command."""
    found = []
    for package in ("cluster", "train", "tune", "serve"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            if re.search(r"^    run_command\(main\)$", path.read_text(), re.MULTILINE):
                found.append(str(path.relative_to(REPOSITORY)))
    return found


def module_name(path: str) -> str:
    return ".".join(Path(path).with_suffix("").parts).removesuffix(".__main__")


def test_there_are_twelve_commands():
    assert len(commands()) == 12


@pytest.mark.slow
@pytest.mark.parametrize("path", commands())
def test_a_command_refuses_an_unknown_option(path, tmp_path):
    command = [sys.executable, "-m", module_name(path), "--no-such-option", "1"]
    result = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")


def test_a_command_ends_on_sigterm_as_on_ctrl_c():
    code = (
        "import signal, time\nfrom cluster.cli import run_command\n"
        # A shell starts background commands with SIGINT ignored, and child processes inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def main(argv):\n    print('up', flush=True)\n    time.sleep(60)\nrun_command(main)"
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "up\n"
        began = time.monotonic()
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert (process.returncode, said) == (1, "error: interrupted\n")
        assert time.monotonic() - began < 30
