"""Mistakes in custom encoders, targets and networks are named before anything is trained."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cluster.errors import UserError
from tests.conftest import make_config
from train.data.fitting import check_custom_classes
from train.loop.net_setup import check_custom_net
from train.tasks import ClassTarget, Features, Task, TensorSpec
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


class WrongName(Color):
    kind = f"{__name__}:WrongName"

    def encode(self, columns):
        return {"hue": super().encode(columns)[self.column]}


class OtherKind(Color):
    kind = f"{__name__}x:Color"


class NoColumn(Color):
    kind = f"{__name__}:NoColumn"

    def to_dict(self):
        return {"kind": self.kind}


class OtherWhenRestored(Color):
    """Its width is not part of the saved state."""

    kind = f"{__name__}:OtherWhenRestored"
    width = 3

    def encode(self, columns):
        return {self.column: super().encode(columns)[self.column][:, : self.width]}

    @classmethod
    def from_dict(cls, state):
        restored = cls(state["column"])
        object.__setattr__(restored, "width", 2)
        return restored


def task_of(encoder):
    return Task(Features((encoder,)), ClassTarget("label", classes=("a", "b"), counts=(2, 1)))


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (WrongType, r"encode returns 'color' float64 \[N, 3\]; its inputs are 'color' float32 \[N"),
        (WrongShape, r"encode returns 'color' float32 \[N, 2\]; its inputs are .* \[N, 3\]"),
        (WrongName, r"encode returns 'hue' float32 .*; its inputs are 'color'"),
        (
            OtherKind,
            rf"to_dict returns the kind '{__name__}x:Color'.*return '{__name__}:OtherKind'",
        ),
        (NoColumn, r"from_dict fails on what to_dict returns: KeyError: 'column'"),
        (OtherWhenRestored, r"encode returns 'color' float32 \[N, 2\]"),
    ],
)
def test_a_mistake_of_an_encoder_is_named(encoder, words):
    allow_modules([__name__])
    with pytest.raises(UserError, match=words) as error:
        check_custom_classes(task_of(encoder("color")), COLUMNS)
    assert f"{__name__}:{encoder.__name__}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_correct_encoder_passes():
    allow_modules([__name__])
    check_custom_classes(task_of(Color("color")), COLUMNS)


class Swapped(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.head = nn.Linear(3, outputs)

    def forward(self, numbers, color):
        return self.head(color) + numbers.sum()


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


def test_the_command_that_serves_a_custom_model_names_its_plugins(capsys):
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
