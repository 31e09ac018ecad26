"""Networks for tables, texts and mixed inputs; losses; ensembles; a custom task."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import make_config
from tests.train.tasks.test_columns import fitted
from train import cli, nets
from train.compress import gate
from train.compress.recipes import export_onnx
from train.config import Net, Optim
from train.configs.curves import Curves
from train.data import dataset
from train.data.schema import inference
from train.loop.checkpoint import CheckpointManager, load_best_weights
from train.loop.loop import Loop
from train.loop.net_setup import build_net
from train.loop.parallelism import Worker
from train.nets.losses import distillation_loss, target_loss
from train.nets.tabular import CategoricalEmbeddings, PiecewiseLinearEncoding, average_members
from train.nets.text import BagOfWords, TransformerEncoder
from train.tasks import ClassTarget, LabelsTarget, Task, ValueTarget
from train.tasks.columns.categorical import FIRST, MISSING, UNSEEN
from train.tasks.features import Features


def test_pieces_match_the_quantiles_of_numpy(rng):
    numbers = rng.normal(size=(500, 2)).astype(np.float32)
    numbers[:100, 1] = 0.25  # a value that many records have
    pieces = PiecewiseLinearEncoding(2, 4)
    pieces.fit_inputs(torch.from_numpy(numbers))
    edges = np.quantile(numbers[:, 0], np.linspace(0, 1, 5))
    value = float(np.quantile(numbers[:, 0], 0.6))
    encoded = pieces(torch.tensor([[value, float("nan")], [99.0, -99.0]]))
    expected = np.clip((value - edges[:-1]) / np.diff(edges), 0, 1)
    np.testing.assert_allclose(encoded[0, :4], expected, atol=1e-5)
    assert encoded[0, 4:8].tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(encoded[:, 8:], [[value, 0, 0, 1], [10, -10, 0, 0]], atol=1e-6)
    assert encoded[1, :8].tolist() == [1] * 4 + [0] * 4


def test_a_value_in_most_records_gets_one_piece(rng):
    """More pieces would only repeat it with more weight; the other values share the rest."""
    numbers = np.where(rng.random((40_000, 1)) < 0.9, 0, rng.uniform(1, 2, (40_000, 1)))
    pieces = PiecewiseLinearEncoding(1, 20)
    pieces.fit_inputs(torch.from_numpy(numbers.astype(np.float32)))
    encoded = pieces(torch.tensor([[-1.0], [0.0], [0.5], [3.0]]))[:, :20]
    assert encoded[:2].sum() == 0
    assert 1 < encoded[2].sum() < 2  # above the frequent value and below the others
    assert encoded[3].sum() == 20
    assert encoded.isfinite().all()
    above = numbers[numbers > 0]
    lows = pieces.low_FT[0]
    np.testing.assert_allclose(lows[2:], np.quantile(above, np.arange(18) / 18), atol=0.02)


def test_few_other_values_share_few_pieces(rng):
    """Pieces with a few records each would be overfitted."""
    numbers = np.where(np.arange(8000) < 7500, 0, rng.uniform(1, 2, 8000))[:, None]
    pieces = PiecewiseLinearEncoding(1, 20)
    pieces.fit_inputs(torch.from_numpy(numbers.astype(np.float32)))
    edges = pieces.low_FT[0][(pieces.low_FT[0] >= 1)].numpy()
    assert len(edges) >= 4
    held = np.histogram(numbers[numbers > 0], np.r_[edges, 2])[0]
    assert held.min() > 80


@pytest.mark.parametrize("num_values", [1, 2, 7, 12])
def test_repeated_values_have_different_encodings(num_values):
    """For any share of the most frequent value; values of few records may matter most."""
    numbers = np.r_[np.zeros(50_000), np.repeat(np.arange(num_values), 500)].astype(np.float32)
    pieces = PiecewiseLinearEncoding(1, 20)
    pieces.fit_inputs(torch.from_numpy(numbers)[:, None])
    encoded = pieces(torch.arange(num_values)[:, None].float())[:, :20]
    assert encoded.isfinite().all()
    assert (encoded.diff(dim=0).sum(dim=1) > 0.3).all()


def test_unseen_and_missing_names_start_at_zero():
    embeddings = CategoricalEmbeddings([30])
    assert not embeddings(torch.tensor([[UNSEEN], [MISSING]])).any()
    assert embeddings(torch.tensor([[FIRST]])).any()


def test_a_bag_is_the_weighted_mean_of_its_words():
    bag = BagOfWords([1.0, 2.0, 0.5, 3.0], 6, dropout=0.5).eval()
    tokens = torch.tensor([[1, 3, 0], [0, 0, 0]])
    vectors = bag.table.weight
    expected = (2 * vectors[1] + 3 * vectors[3]) / 5
    torch.testing.assert_close(bag(tokens)[0], expected)
    assert not bag(tokens)[1].any(), "a text without words is zero, not NaN"


def test_a_transformer_ignores_padding():
    torch.manual_seed(0)
    net = TransformerEncoder(50, 8, 16, 2, dropout=0.1).eval()
    short = net(torch.tensor([[5, 6, 7, 0]]))
    long = net(torch.tensor([[5, 6, 7, 0, 0, 0, 0, 0]]))
    torch.testing.assert_close(short, long)
    assert net(torch.zeros(1, 4, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize(
    "net",
    [
        TransformerEncoder(50, 12, 16, 2, dropout=0.0).double(),
        BagOfWords([1.0, 2.0, 0.5] * 17, 6, dropout=0.0).double(),
    ],
    ids=["transformer", "bag_of_words"],
)
def test_padding_changes_neither_the_loss_nor_its_gradient(net, rng):
    """A padded batch of texts against each text alone, without padding."""
    lengths = [5, 1, 12, 3, 0]
    texts = [torch.from_numpy(rng.integers(1, 50, max(length, 1))) for length in lengths]
    texts[-1][:] = 0
    head = torch.from_numpy(rng.normal(size=(net.width, 3)))
    classes = torch.tensor([0, 2, 1, 1, 0])

    def gradients(loss):
        net.zero_grad()
        loss.backward()
        return [param.grad.clone() for param in net.parameters()]

    alone = torch.stack(
        [
            F.cross_entropy(net(text[None]) @ head, chosen[None])
            for text, chosen in zip(texts, classes, strict=True)
        ]
    ).mean()
    expected = gradients(alone)
    batch = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    for padding in (0, 7 if isinstance(net, BagOfWords) else 0):
        given = F.pad(batch, (0, padding))
        together = F.cross_entropy(net(given) @ head, classes)
        torch.testing.assert_close(together, alone)
        for one, other in zip(gradients(together), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_losses_agree_with_torch(rng):
    device = torch.device("cpu")
    logits = torch.from_numpy(rng.normal(size=(9, 3)).astype(np.float32))
    classes = torch.from_numpy(rng.integers(0, 3, 9))
    target = ClassTarget("y", ("a", "b", "c"), (10, 20, 70))
    loss = target_loss(target, Optim(label_smoothing=0.1, class_weights="balanced"), device)
    weights = torch.tensor([100 / 30, 100 / 60, 100 / 210])
    each = F.cross_entropy(logits, classes, weights, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(loss(logits, classes), each.mean())
    halves = torch.stack([loss(logits[:3], classes[:3]), loss(logits[3:], classes[3:])])
    torch.testing.assert_close((halves * torch.tensor([3 / 9, 6 / 9])).sum(), each.mean())
    several = torch.from_numpy(rng.integers(0, 2, (9, 3)).astype(np.uint8))
    loss = target_loss(LabelsTarget("y", ("a", "b", "c")), Optim(label_smoothing=0.0), device)
    expected = F.binary_cross_entropy(torch.sigmoid(logits), several.float())
    torch.testing.assert_close(loss(logits, several), expected)
    target = LabelsTarget("y", ("a", "b", "c"), (10, 20, 50), 100)
    loss = target_loss(target, Optim(label_smoothing=0.0, class_weights="balanced"), device)
    weights = torch.where(several > 0, torch.tensor([9.0, 4.0, 1.0]), 1.0)
    expected = F.binary_cross_entropy(torch.sigmoid(logits), several.float(), weights)
    torch.testing.assert_close(loss(logits, several), expected)
    values = torch.from_numpy(rng.normal(size=9).astype(np.float32)) * 3
    loss = target_loss(ValueTarget("y", 0.0, 1.0), Optim(), device)
    expected = F.huber_loss(logits[:, 0], values, delta=0.5)
    torch.testing.assert_close(loss(logits[:, :1], values), expected)
    numpy_loss = ValueTarget("y", 0.0, 1.0).metrics({"logits": logits.numpy()}, values.numpy())
    assert numpy_loss["loss"] == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="no classes"):
        target_loss(ValueTarget("y"), Optim(class_weights="balanced"), device)


@pytest.fixture
def mixed(rng):
    """A task with every kind of column, and its encoded records."""
    kinds = {"n": "number", "c": "category", "t": "text", "i": "image"}
    records = {
        "n": rng.normal(size=40).tolist(),
        "c": list(rng.choice(["x", "y", "z"], 40)),
        "t": [" ".join(rng.choice(["a", "b", "c", "d"], 5)) for _ in range(40)],
        "i": list(rng.integers(0, 256, (40, 9, 9, 3), dtype=np.uint8)),
    }
    records["n"][3] = records["c"][4] = records["t"][5] = records["i"][6] = None
    task = Task.of({name: {"kind": kind} for name, kind in kinds.items()}, "y", "classification")
    task = fitted(task, records, ["p", "q"] * 20)
    return task, task.features.encode(records)


@pytest.mark.parametrize("text", ["bag_of_words", "transformer"])
def test_nets_for_every_kind_of_input_export_with_equal_outputs(mixed, tmp_path, text):
    task, arrays = mixed
    torch.manual_seed(0)
    net = nets.create_net(Net(widths=[8, 16], text=text, text_width=16), task)
    net.fit_inputs(*[torch.from_numpy(array) for array in arrays.values()])
    tensors = [torch.from_numpy(array) for array in arrays.values()]
    before = net.eval()(*tensors)
    assert before.isfinite().all()
    export_onnx.to_onnx(nets.folded_net(net), task.features.inputs, arrays, tmp_path / "net.onnx")
    torch.testing.assert_close(net(*tensors), before, rtol=1e-3, atol=1e-4)


def test_outputs_for_mixed_inputs_do_not_depend_on_the_batch(mixed):
    task, arrays = mixed
    net = nets.create_net(Net(widths=[8, 16]), task).eval()
    tensors = [torch.from_numpy(array) for array in arrays.values()]
    whole = net(*tensors)
    for row in (0, 5, 39):
        torch.testing.assert_close(net(*[each[row : row + 1] for each in tensors])[0], whole[row])


def test_columns_without_values_give_finite_outputs():
    kinds = {"n": "number", "d": "date", "c": "category", "t": "text"}
    task = Task.of({name: {"kind": kind} for name, kind in kinds.items()}, "y", "regression")
    records = {name: [None] * 6 for name in kinds}
    task = fitted(task, records, range(6))
    arrays = task.features.encode(records)
    assert np.isnan(arrays["numbers"]).all()
    assert (arrays["categories"] == 1).all()
    assert not arrays["tokens"].any()
    net = nets.create_net(Net(), task)
    net.fit_inputs(*[torch.from_numpy(array) for array in arrays.values()])
    outputs = net.eval()(*[torch.from_numpy(array) for array in arrays.values()])
    assert outputs.isfinite().all()
    later = {"n": [3.5], "d": ["2024-01-01"], "c": ["x"], "t": ["words"]}
    assert (
        net(*[torch.from_numpy(a) for a in task.features.encode(later).values()]).isfinite().all()
    )


def test_the_gate_handles_metrics_where_lower_is_better():
    task = Curves(Features(()), ValueTarget("y", mean=0.0, scale=1.0))
    targets_N = np.zeros(100, np.float32)
    by = {size: {"logits": np.full((100, 1), size, np.float32)} for size in (0.5, 1.0, 1.004, 1.1)}
    for size, verdict in ((1.004, "accepted"), (0.5, "accepted"), (1.1, "refused")):
        comparison = gate.compare_with_fp32(task, by[1.0], by[size], targets_N)
        assert comparison.drop == pytest.approx(size - 1, abs=1e-6)
        assert gate.judge_variant(comparison, 0.005).verdict == verdict


def test_a_class_that_is_not_a_net_is_refused():
    config = make_config(net="train.config:Net")
    task = fitted(Task.of({"n": {"kind": "number"}}, "y", "regression"), {"n": [1, 2]}, [1, 2])
    with pytest.raises((ValueError, TypeError)):
        build_net(config, task)


def test_the_example_of_a_custom_task_learns(tmp_path, rng):
    """The records are curves of one to four waves; the target is the number of waves."""
    waves = rng.uniform(1, 4, 300)
    places = np.linspace(0, 1, 32)
    curves = np.sin(2 * np.pi * waves[:, None] * places) + rng.normal(0, 0.05, (300, 32))
    path = tmp_path / "curves.parquet"
    pa.parquet.write_table(pa.table({"curve": curves.tolist(), "value": waves}), path)
    options = ["--config", "train/configs/curves.yaml", "--data.train", str(path)]
    config = inference.complete_config(cli.parse([*options, "--workers.num", "1"]).config).config
    prepared = dataset.prepare_dataset(config, str(tmp_path / "runs"))
    store = CheckpointManager(str(tmp_path / "checkpoints"), keep=1)
    history = []
    Loop(
        config,
        prepared,
        Worker(rank=0, world_size=1, device=torch.device("cpu")),
        store,
        num_micro_batches=1,
        observe=lambda event: history.append(event) if event["event"] == "epoch" else None,
    ).run()
    assert history[-1]["valid_mae"] < 0.5 * np.abs(waves - waves.mean()).mean()
    assert prepared.task.metric == "mae"
    assert Task.from_dict(prepared.task.to_dict()) == prepared.task
    weights, _ = load_best_weights(store)
    net = build_net(config, prepared.task)
    net.load_state_dict(weights)
    inputs, _ = prepared.open("test")
    sample = {name: np.array(array[:8]) for name, array in inputs.items()}
    specs = prepared.task.features.inputs
    export_onnx.to_onnx(nets.folded_net(net), specs, sample, tmp_path / "net.onnx")


@pytest.mark.parametrize("kind", [ClassTarget, LabelsTarget, ValueTarget])
def test_an_ensemble_predicts_the_mean_of_its_members(rng, kind):
    target = kind("y") if kind is ValueTarget else kind("y", ("a", "b", "c"))
    outputs_BMK = torch.from_numpy(rng.normal(size=(6, 4, target.num_outputs)).astype(np.float32))
    averaged = {"logits": average_members(outputs_BMK, target).numpy()}
    each = [{"logits": outputs_BMK[:, member].numpy()} for member in range(4)]
    if kind is ValueTarget:
        expected = np.mean([one["logits"] for one in each], axis=0)
        np.testing.assert_allclose(averaged["logits"], expected, atol=1e-6)
        return
    expected = np.mean([target.decode(one)["probabilities"] for one in each], axis=0)
    np.testing.assert_allclose(target.decode(averaged)["probabilities"], expected, atol=1e-6)


def test_the_loss_of_an_ensemble_is_the_mean_over_its_members(rng):
    """So each member learns from its own loss, independent of the other members."""
    outputs = torch.from_numpy(rng.normal(size=(9, 4, 3)).astype(np.float32))
    classes = torch.from_numpy(rng.integers(0, 3, 9))
    loss = target_loss(ClassTarget("y", ("a", "b", "c")), Optim(), torch.device("cpu"))
    expected = torch.stack([loss(outputs[:, member], classes) for member in range(4)]).mean()
    torch.testing.assert_close(loss(outputs, classes), expected)
    soft = distillation_loss(ClassTarget("y", ("a", "b", "c")), 2.0)
    teacher = torch.from_numpy(rng.normal(size=(9, 3)).astype(np.float32))
    expected = torch.stack([soft(outputs[:, member], teacher) for member in range(4)]).mean()
    torch.testing.assert_close(soft(outputs, teacher), expected)


def test_a_table_ensemble_evaluates_and_exports_as_one_net(mixed, tmp_path):
    task, arrays = mixed
    torch.manual_seed(0)
    net = nets.create_net(Net(widths=[8, 16], members=4, hidden=[32, 32]), task)
    tensors = [torch.from_numpy(array) for array in arrays.values()]
    assert net.train()(*tensors).shape == (40, 4, task.target.num_outputs)
    assert net.eval()(*tensors).shape == (40, task.target.num_outputs)
    assert set(net.hidden[0].signs_MD.flatten().tolist()) == {-1.0, 1.0}
    export_onnx.to_onnx(nets.folded_net(net), task.features.inputs, arrays, tmp_path / "net.onnx")


def test_training_masks_some_values_as_unseen_or_missing():
    torch.manual_seed(0)
    embeddings = CategoricalEmbeddings([5, 5], with_missing_C=[True, False])
    codes_BC = torch.full((2_000, 2), 3)
    embeddings(codes_BC).sum().backward()
    with_missing, without = (table.weight.grad.any(dim=1).tolist() for table in embeddings.tables)
    assert with_missing == [True, False, False, True, False]
    assert without == [True, True, False, True, False]
    assert (embeddings.eval()(codes_BC) == embeddings(codes_BC[:1])).all()

    numbers = PiecewiseLinearEncoding(2, 4, with_missing_F=[True, False])
    numbers.fit_inputs(torch.randn(500, 2))
    missing_BF = numbers(torch.zeros(2_000, 2))[:, -2:]
    assert missing_BF[:, 0].sum() == 0
    assert 5 < missing_BF[:, 1].sum() < 40
    assert numbers.eval()(torch.zeros(2_000, 2))[:, -2:].sum() == 0
