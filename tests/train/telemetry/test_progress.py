"""Progress on the terminal, FLOPs of a net, and observers of events."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.train.loop.test_loop import ALONE
from train.loop.checkpoint import CheckpointManager
from train.loop.loop import Loop
from train.telemetry import efficiency
from train.telemetry.events import until_failure
from train.telemetry.progress_bar import ProgressDisplay


def test_without_a_terminal_each_epoch_is_one_plain_line(config, digits, tmp_path):
    text = io.StringIO()
    events = []
    with ProgressDisplay(2, Console(file=text, width=40)) as display:
        Loop(
            config,
            digits,
            ALONE,
            CheckpointManager(str(tmp_path), keep=2),
            num_micro_batches=1,
            observe=lambda event: (events.append(event), display.show(event)),
        ).run()
    lines = text.getvalue().splitlines()
    assert lines[0] == "training on 1 worker"
    assert [line.split("  ")[0] for line in lines[1:]] == ["epoch 1/2", "epoch 2/2"]
    assert "\x1b" not in text.getvalue()
    steps = [event for event in events if event["event"] == "steps"]
    assert [event["step"] for event in steps] == [10, 20, 30]
    for event in steps:
        assert all(np.isfinite(value) for key, value in event.items() if key != "event")
        assert event["grad_norm"] > 0


def test_flops_of_a_convolution_are_its_multiply_adds():
    net = torch.nn.Conv2d(3, 8, 3, padding=1)
    forward = 2 * 8 * 3 * 3 * 3 * 32 * 32
    flops = efficiency.training_flops(net, [torch.zeros(4, 3, 32, 32)])
    assert flops == pytest.approx(3 * forward)


def test_a_failing_observer_is_reported_once_and_then_disabled(capsys):
    seen = []

    def observe(event):
        seen.append(event["step"])
        if len(seen) == 2:
            raise ConnectionError("the server is gone\nsince noon")

    record = until_failure(observe)
    for step in range(4):
        record({"event": "steps", "step": step})
    assert seen == [0, 1]
    assert capsys.readouterr().err == "metrics are no longer recorded: the server is gone\n"
