"""`python train/main.py` with wrong input: the exit status and the message.

tests/test_end_to_end.py runs it once as a process; here it runs in this one.
"""

import pytest

from tests.conftest import call_command
from train.main import main

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optim.rate", "1"], ["--optim.rate"]),
        (["--data.train", "missing.parquet"], ["missing.parquet"]),
        (["--net.widths", "[8,8,8]"], ["8×8", "net.widths"]),
        (["--workers.num", "100"], ["samples cannot be shared by 100 workers"]),
        (["--workers.micro_batches", "1"], ["workers.micro_batches is 1", "workers.num up to 2"]),
        (["--workers.gpu", "true"], ["1 GPU", "0 GPU"]),
        (["--augment.translate", "8"], ["have 8 pixels a side; give at most 7"]),
        (["--decision_rule.recall", "0.9"], ["is for two classes", "has 10"]),
        (["--quantile", "0.9"], ["quantile is for a number"]),
        (["--registry.metric", "test_accuracy"], ["test_accuracy", "valid_accuracy"]),
        (["--storage.path", "README.md/runs"], ["README.md", "storage.path"]),
    ],
)
def test_wrong_input_exits_2_with_one_line(
    ray_session, arguments, words, tmp_path, monkeypatch, capfd
):
    runs = tmp_path / "runs"
    status = call_command(main, ["--storage.path", str(runs), *arguments], monkeypatch)
    printed = capfd.readouterr()
    assert status == 2
    assert '"model"' not in printed.out
    assert "Traceback" not in printed.err
    # Messages of Ray's processes may follow.
    (line,) = [each for each in printed.err.splitlines() if each.startswith("error: ")]
    for word in words:
        assert word in line
    assert not (runs / "bundles").exists()
