"""The documentation names what exists, and everything that exists is documented."""

import ast
import re
import subprocess

import pytest

from docs import reference_pages
from serve.config import GatewayConfig, ServeConfig
from tests.server import REPOSITORY
from tune.config import StudyConfig

TOP = [REPOSITORY / name for name in ("README.md", "CHANGELOG.md", "k8s/README.md")]
PAGES = sorted([*(REPOSITORY / "docs").rglob("*.md"), *TOP])
PAGES = [page for page in PAGES if "_build" not in page.parts]
GENERATED = reference_pages.generated_pages()
CODE_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
METRIC = re.compile(r"\b(?:ray_)?halyard_[a-z_]+")
# A path of the repository: `train/main.py`, `serve/configs/`.
PATH = re.compile(r"(?:cluster|docs|k8s|serve|tests|train|tune)/[\w./-]*\w/?")
FILE_TYPES = ("csv", "json", "md", "onnx", "py", "yaml")
# Functions that have the name of a section.
FUNCTIONS = {"tune.tune"}
# Commands that the project runs itself.
INTERNAL = {
    "cluster/ingress/haproxy_config.py",
    "serve/replica/json_process.py",
    "train/pretrained/unpickle.py",
}
# Ends of a histogram's time series, and patterns such as halyard_*.
SERIES = ("_bucket", "_count", "_sum")


def options(fields):
    names = {option.name for option in reference_pages.options_of(fields)}
    for section, kind in reference_pages.sections_of(fields):
        names.add(section)
        names |= {
            option.name for option in reference_pages.options_of(kind.model_fields, f"{section}.")
        }
    return names


OPTIONS = options(StudyConfig.model_fields) | options(ServeConfig.model_fields)
OPTIONS |= options(GatewayConfig.model_fields)
SECTIONS = {name.split(".")[0] for name in OPTIONS if "." in name}


def relative(page):
    return str(page.relative_to(REPOSITORY))


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_up_to_date(name):
    found = (reference_pages.PAGES / name).read_text()
    assert found == GENERATED[name], "run python docs/reference_pages.py"


def test_every_command_has_a_section():
    documented = {command.module for command in reference_pages.COMMANDS} | INTERNAL
    tracked = subprocess.run(
        ["git", "ls-files", "cluster", "train", "tune", "serve"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in tracked:
        if name.endswith(".py") and _is_command(ast.parse((REPOSITORY / name).read_text())):
            assert name in documented


def _is_command(tree):
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in tree.body
    )


def test_an_option_without_a_description_fails():
    from pydantic import BaseModel

    class Section(BaseModel):
        rate: float = 1.0

    with pytest.raises(ValueError, match=r"section\.rate has no description"):
        list(reference_pages.options_of(Section.model_fields, "section."))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_options_that_a_page_names_exist(page):
    for span in CODE_SPAN.findall(page.read_text()):
        name = re.split(r"[ =:]", span.removeprefix("--"))[0]
        section, dot, _ = name.partition(".")
        is_file = name.rpartition(".")[2] in FILE_TYPES
        if dot and section in SECTIONS and re.fullmatch(r"[a-z_.]+", name) and not is_file:
            assert name in OPTIONS | FUNCTIONS, f"{relative(page)} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_metrics_that_a_page_names_exist(page):
    known = {name for name, _, _ in reference_pages.metrics()}
    known |= {f"ray_{reference_pages.training_metrics.PREFIX}{name}" for name in TRAINING}
    for name in METRIC.findall(page.read_text()):
        plain = next((name.removesuffix(end) for end in SERIES if name.endswith(end)), name)
        assert plain in known or name.endswith("_") or plain.startswith("halyard_live_"), name


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_files_that_a_page_names_exist(page):
    for span in CODE_SPAN.findall(page.read_text()):
        if PATH.fullmatch(span):
            assert (REPOSITORY / span).exists(), f"{relative(page)} names {span}"


def test_the_readme_is_short():
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 110
    assert sum(len(line.split()) for line in lines) <= 2000


TRAINING = reference_pages.training_metrics.WORDS
