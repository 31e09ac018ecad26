"""Mistakes in custom encoders, targets and networks are named before anything is trained."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cluster.errors import UserError
from tests.conftest import make_config
from train.loop.net_setup import check_custom_net
from train.tasks import ClassTarget, Features, Images, InvalidRecord, Task, TensorSpec
from train.tasks.custom_classes import check_custom_classes
from train.tasks.plugins import allow_modules
from train.training import print_next_steps

COLUMNS = {"color": ["#ff8800", None, "#0000ff"]}


@dataclass(frozen=True)
class Color:
    """A correct encoder; the others make one mistake each."""

    column: str
    kind = f"{__name__}:Color"

    @property
    def fields(self):
        return (TensorSpec(self.column, "BYTES", ()),)

    @property
    def inputs(self):
        return (TensorSpec(self.column, "FP32", (3,)),)

    def fit(self, columns):
        return self

    def encode(self, columns):
        parts = [list(bytes.fromhex((value or "#000000")[1:])) for value in columns[self.column]]
        return {self.column: np.array(parts, np.float32)}

    def to_dict(self):
        return {"kind": self.kind, "column": self.column}

    @classmethod
    def from_dict(cls, state):
        return cls(state["column"])


class WrongType(Color):
    kind = f"{__name__}:WrongType"

    def encode(self, columns):
        return {self.column: super().encode(columns)[self.column].astype(np.float64)}


class WrongShape(Color):
    kind = f"{__name__}:WrongShape"

    def encode(self, columns):
        return {self.column: super().encode(columns)[self.column][:, :2]}


class TooFew(Color):
    kind = f"{__name__}:TooFew"

    def encode(self, columns):
        return {self.column: super().encode(columns)[self.column][1:]}


class WrongName(Color):
    kind = f"{__name__}:WrongName"

    def encode(self, columns):
        return {"hue": super().encode(columns)[self.column]}


class NoArray(Color):
    kind = f"{__name__}:NoArray"

    def encode(self, columns):
        return {self.column: super().encode(columns)[self.column].tolist()}


class NoMapping(Color):
    kind = f"{__name__}:NoMapping"

    def encode(self, columns):
        return super().encode(columns)[self.column]


class ListShape(Color):
    kind = f"{__name__}:ListShape"

    @property
    def inputs(self):
        return (TensorSpec(self.column, "FP32", [3]),)


class Reader(Color):
    kind = f"{__name__}:Reader"

    def encode(self, columns):
        if "bad" in columns[self.column]:
            raise InvalidRecord("no color", 1)
        return super().encode(columns)


class Failing(Color):
    kind = f"{__name__}:Failing"

    def encode(self, columns):
        raise KeyError("several\nlines")


class OtherModule(Color):
    kind = f"{__name__}x:Color"


class OtherClass(Color):
    kind = f"{__name__}:Color"


class NoColumn(Color):
    kind = f"{__name__}:NoColumn"

    def to_dict(self):
        return {"kind": self.kind}


class NoKind(Color):
    kind = f"{__name__}:NoKind"

    def to_dict(self):
        return {"column": self.column}


class NoJSON(Color):
    kind = f"{__name__}:NoJSON"

    def to_dict(self):
        return {**super().to_dict(), "mean": np.float32(1)}


@dataclass(frozen=True)
class Scaled(Color):
    """It learned a scale, which is not part of its state."""

    scale: float = 1.0
    kind = f"{__name__}:Scaled"

    def encode(self, columns):
        return {self.column: super().encode(columns)[self.column] / np.float32(self.scale)}


@dataclass(frozen=True)
class Strict(Color):
    """A restored one accepts nothing."""

    strict: bool = False
    kind = f"{__name__}:Strict"

    def encode(self, columns):
        if self.strict:
            raise InvalidRecord("no color", 0)
        return super().encode(columns)

    @classmethod
    def from_dict(cls, state):
        return cls(state["column"], strict=True)


def task_of(encoder):
    return Task(Features((encoder,)), ClassTarget("label", classes=("a", "b"), counts=(2, 1)))


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (
            WrongType("color"),
            r"returns 'color' float64 .*; its inputs are 'color' float32 \[3, 3\]",
        ),
        (WrongShape("color"), r"returns 'color' float32 \[3, 2\]; its inputs are .* \[3, 3\]"),
        (TooFew("color"), r"of 3 records returns 'color' float32 \[2, 3\]; its inputs are"),
        (WrongName("color"), r"returns 'hue' float32 .*; its inputs are 'color'"),
        (NoArray("color"), r"returns 'color' list \[3, 3\]; its inputs are"),
        (NoMapping("color"), r"returns ndarray; its inputs are"),
        (Failing("color"), r"encode fails: KeyError: 'several.nlines'"),
        (OtherModule("color"), r"kind '.*x:Color', by which a model does not find the class"),
        (OtherClass("color"), r"returns the kind '.*:Color', by which a model does not find"),
        (NoKind("color"), r"returns the kind None, by which a model does not find"),
        (NoColumn("color"), r"from_dict fails: KeyError: 'column'"),
        (NoJSON("color"), r"to_dict: TypeError: .* not JSON serializable"),
        (Scaled("color", 2.0), r"from_dict .* encodes 'color' differently"),
        (Strict("color"), r"from_dict .* refuses a record .*: InvalidRecord: no color"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_mistake_of_an_encoder_is_named(encoder, words):
    allow_modules([__name__])
    with pytest.raises(UserError, match=words) as error:
        check_custom_classes(task_of(encoder), COLUMNS)
    assert str(error.value).startswith(f"{__name__}:{type(encoder).__name__}.")
    assert "\n" not in str(error.value)


def test_a_correct_encoder_passes():
    allow_modules([__name__])
    check_custom_classes(task_of(Color("color")), COLUMNS)
    check_custom_classes(task_of(ListShape("color")), COLUMNS)
    # A record that cannot be read is reported when all are encoded.
    check_custom_classes(task_of(Reader("color")), {"color": ["#ff8800", "bad"]})


def test_an_encoder_of_images_is_not_given_their_headers():
    """The sample of training records holds headers of images, not the images."""
    allow_modules([__name__])

    images = Images("color", (8, 8), 1)
    task = Task(Features((images, Color("color"))), task_of(images).target)
    check_custom_classes(task, {"color": [object(), object()]})


class Swapped(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.head = nn.Linear(3, outputs)

    def fit_inputs(self, numbers, color):
        self.scale = numbers.abs().amax() + 1

    def forward(self, numbers, color):
        return self.head(color) + (numbers / self.scale).sum()


@pytest.mark.parametrize(
    ("order", "outputs", "words"),
    [
        (("color", "numbers"), 2, r"given color float32 \[2, 3\], numbers float32 \[2, 7\], fails"),
        (("numbers", "color"), 5, r"returns \[2, 5\]; expected \[2, 2\]"),
    ],
)
def test_a_mistake_of_a_network_is_named(order, outputs, words):
    arrays = {"color": np.zeros((9, 3), np.float32), "numbers": np.zeros((9, 7), np.float32)}
    config = make_config(net={"class_path": f"{__name__}:Swapped"})
    inputs = {name: arrays[name] for name in order}
    with pytest.raises(ValueError, match=words):
        check_custom_net(Swapped(outputs), config, task_of(Color("color")), inputs)


def test_a_correct_network_passes_and_keeps_its_weights():
    arrays = {"numbers": np.zeros((1, 7), np.float32), "color": np.ones((1, 3), np.float32)}
    net = Swapped(2)
    before = net.head.weight.clone()
    check_custom_net(net, make_config(), task_of(Color("color")), arrays)
    assert torch.equal(net.head.weight, before)


def test_the_command_that_serves_a_custom_model_has_its_plugins(capsys):
    task = {"features": [{"kind": "numbers"}, {"kind": "colors.hex:Color"}], "target": {}}
    config = {"net": {"class_path": "colors.net:ColorNet"}}
    bundle = SimpleNamespace(
        location="bundles/a", manifest=SimpleNamespace(task=task, config=config)
    )
    print_next_steps(bundle, "models:/a@production")
    card, command = capsys.readouterr().err.splitlines()
    assert card == "model card: bundles/a/report/card.html"
    given = "model=models:/a@production plugins=colors.hex,colors.net"
    assert command == f"next: serve run serve.app {given}"
    print_next_steps(bundle)  # not registered
    assert capsys.readouterr().err.splitlines() == [card]
