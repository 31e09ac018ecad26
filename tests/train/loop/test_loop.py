"""The network, optimizers, schedules, checkpoints and the loop, against numpy and torch."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import make_config
from train.config import Optim
from train.loop import evaluate, lr_schedule, optimizers
from train.loop.checkpoint import CheckpointManager, Superseded, TrainingState, load_best_weights
from train.loop.loop import Diverged, Loop
from train.loop.net_setup import build_net
from train.loop.parallelism import Worker
from train.loop.state_dict import EMA
from train.nets import ConvNet

ALONE = Worker(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(params=["relu", "gelu"])
def net(rng, request):
    torch.manual_seed(0)
    net = ConvNet((9, 10, 3), num_outputs=4, widths=[8, 6], whiten=True, activation=request.param)
    images = torch.from_numpy(rng.integers(0, 256, (64, 9, 10, 3), dtype=np.uint8))
    net.fit_inputs(images)
    net.train()
    for _ in range(3):  # fill the running statistics of the norms
        net(images)
    with torch.no_grad():
        for block in net.blocks:
            block.norm1.bias.normal_()
    return net.eval()


def test_the_stem_whitens_patches(net, rng):
    images = torch.from_numpy(rng.integers(0, 256, (500, 9, 10, 3), dtype=np.uint8))
    net.fit_inputs(images)
    with torch.no_grad():
        normal = ((images / 255 - net.mean) / net.std).permute(0, 3, 1, 2)
        answers = net.stem(normal).permute(0, 2, 3, 1).reshape(-1, 24)[:, :12].numpy()
    np.testing.assert_allclose(np.cov(answers.T, bias=True), np.eye(12), atol=0.02)


def test_the_folded_net_gives_the_same_logits(net, rng):
    images = torch.from_numpy(rng.integers(0, 256, (16, 9, 10, 3), dtype=np.uint8))
    with torch.no_grad():
        torch.testing.assert_close(net.folded()(images), net(images), rtol=1e-4, atol=1e-4)


def test_a_net_too_deep_for_its_images_is_refused():
    with pytest.raises(ValueError, match=r"8×8 are too small .* at most 2 widths"):
        ConvNet((8, 8, 1), 10, [8, 8, 8], whiten=True)


def schedule_reference(name, warmup_steps, total_steps):
    """Return the rate factors of a whole run, computed in numpy."""
    warmup = np.linspace(0, 1, warmup_steps + 2)[1:-1]
    progress = np.linspace(0, 1, total_steps - warmup_steps + 1)[:-1]
    falls = {
        "constant": np.ones_like(progress),
        "linear": 1 - progress,
        "cosine": (1 + np.cos(np.pi * progress)) / 2,
    }
    return np.concatenate([warmup, falls[name]])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.25])
def test_schedules_agree_with_numpy(name, warmup_fraction):
    optim = Optim(schedule=name, warmup_fraction=warmup_fraction)
    factors = [lr_schedule.lr_factor(optim, step, 40) for step in range(40)]
    np.testing.assert_allclose(
        factors, schedule_reference(name, round(40 * warmup_fraction), 40), atol=1e-12
    )


def test_a_net_that_is_only_a_head_has_an_optimizer():
    net = torch.nn.Sequential()
    net.add_module("head", torch.nn.Linear(4, 2))
    groups = [
        group for each in optimizers.build_optimizers(Optim(), net) for group in each.param_groups
    ]
    assert sum(len(group["params"]) for group in groups) == 2


def test_one_cycle_agrees_with_torch():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=50, pct_start=0.3, cycle_momentum=False
    )
    optim = Optim(schedule="one_cycle")
    for step in range(50):
        factor = lr_schedule.lr_factor(optim, step, 50)
        assert factor == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-9)
        optimizer.step()
        if step < 49:
            reference.step()


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "one_cycle"])
@pytest.mark.parametrize("warmup_fraction", [None, 0.0, 0.02, 0.3, 0.99])
def test_schedules_of_any_length_reach_the_peak(name, warmup_fraction):
    optim = Optim(schedule=name, warmup_fraction=warmup_fraction)
    for total_steps in (1, 2, 3, 4, 5, 7, 10, 50, 100):
        factors = [lr_schedule.lr_factor(optim, step, total_steps) for step in range(total_steps)]
        assert all(0 < factor <= 1 for factor in factors)
        # As in torch, the peak of one_cycle may lie between two steps.
        assert max(factors) == 1 or (name == "one_cycle" and warmup_fraction != 0)
        if warmup_fraction == 0:
            assert factors[0] == 1


def muon_reference(weight, gradients, lr, momentum):
    """Return the weight after Muon's steps, computed in float64 numpy."""
    a, b, c = 3.4445, -4.7750, 2.0315
    state = np.zeros_like(weight)
    for gradient in gradients:
        state = momentum * state + gradient
        update = gradient + momentum * state
        matrix = update.reshape(len(update), -1)
        matrix = matrix / np.linalg.norm(matrix)
        tall = matrix.shape[0] > matrix.shape[1]
        if tall:
            matrix = matrix.T
        for _ in range(3):
            gram = matrix @ matrix.T
            matrix = a * matrix + (b * gram + c * gram @ gram) @ matrix
        if tall:
            matrix = matrix.T
        weight = weight * math.sqrt(len(weight)) / np.linalg.norm(weight)
        factor = math.sqrt(max(1, matrix.shape[0] / matrix.shape[1]))
        weight = weight - lr * factor * matrix.reshape(weight.shape)
    return weight


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (40, 2, 3, 3), (5, 7)])
def test_muon_agrees_with_numpy(shape, rng):
    weight = torch.nn.Parameter(torch.from_numpy(rng.normal(size=shape)))
    gradients = [rng.normal(size=shape) for _ in range(4)]
    expected = muon_reference(weight.detach().numpy().copy(), gradients, lr=0.1, momentum=0.6)
    muon = optimizers.Muon([weight], lr=0.1, momentum=0.6, dtype=torch.float64)
    for gradient in gradients:
        weight.grad = torch.from_numpy(gradient)
        muon.step()
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(128, 512), (128, 128), (128, 16), (128, 4)])
def test_the_rate_of_muon_is_about_the_angle_of_a_step(shape, rng):
    weight = torch.nn.Parameter(torch.from_numpy(rng.normal(size=shape)).float())
    weight.data *= shape[0] ** 0.5 / weight.norm()
    before = weight.detach().clone()
    weight.grad = torch.from_numpy(rng.normal(size=shape)).float()
    optimizers.Muon([weight], lr=0.1, momentum=0.0).step()
    cosine = torch.dot(before.flatten(), weight.flatten()) / (before.norm() * weight.norm())
    assert 0.07 < torch.arccos(cosine).item() < 0.11


def test_muon_moves_a_weight_of_zeros(rng):
    weight = torch.nn.Parameter(torch.zeros(6, 9))
    for _ in range(3):
        weight.grad = torch.from_numpy(rng.normal(size=(6, 9))).float()
        optimizers.Muon([weight], lr=0.1, momentum=0.6).step()
    assert weight.isfinite().all()
    assert weight.norm().item() == pytest.approx(6**0.5, rel=0.2)


class WithTokens(torch.nn.Module):
    """A net with matrices of several kinds; only those of `inner` and `conv` are linear maps."""

    def __init__(self):
        super().__init__()
        self.token = torch.nn.Parameter(torch.zeros(1, 1, 8))
        self.places = torch.nn.Parameter(torch.zeros(5, 8))
        self.names = torch.nn.Embedding(7, 8)
        self.inner = torch.nn.Linear(8, 8)
        self.conv = torch.nn.Conv1d(8, 8, 3)
        self.head = torch.nn.Linear(8, 2)


def test_muon_updates_only_linear_and_convolution_weights():
    net = WithTokens()
    muon, adam = optimizers.build_optimizers(Optim(name="muon"), net)
    turned = {id(param) for group in muon.param_groups for param in group["params"]}
    assert turned == {id(net.inner.weight), id(net.conv.weight)}
    rest = {id(param) for group in adam.param_groups for param in group["params"]}
    assert turned | rest == {id(param) for param in net.parameters()}


def test_three_iterations_scale_singular_values_as_documented(rng):
    values = np.array([0.03, 0.05, 0.1, 0.3, 0.5, 0.8])
    values /= np.linalg.norm(values) / np.linalg.norm([0.03, 0.05, 0.1, 0.3, 0.5, 0.8])
    values = np.r_[values, np.sqrt(max(1 - (values**2).sum(), 0))]
    left, right = (np.linalg.qr(rng.normal(size=(7, 7)))[0] for _ in range(2))
    matrix = torch.from_numpy(left @ np.diag(values / np.linalg.norm(values)) @ right.T)
    turned = np.linalg.svd(optimizers.orthogonalize(matrix).numpy(), compute_uv=False)
    assert 0.65 < turned.min() <= turned.max() < 1.21
    small = torch.diag(torch.tensor([1.0, 1e-4], dtype=torch.float64))
    raised = optimizers.orthogonalize(small)[1, 1].item()
    assert raised == pytest.approx(1e-4 * 3.4445**3, rel=1e-3)


def test_muon_steps_are_nearly_orthogonal(rng):
    turn = optimizers.orthogonalize(torch.from_numpy(rng.normal(size=(16, 60))), num_iterations=5)
    values = np.linalg.svd(turn.numpy(), compute_uv=False)
    assert 0.5 < values.min() <= values.max() < 1.3


@pytest.mark.parametrize("name", ["muon", "sgd", "adamw"])
def test_each_weight_is_in_one_group_and_vectors_do_not_decay(net, name):
    built = optimizers.build_optimizers(Optim(name=name, weight_decay=0.1), net)
    groups = [group for each in built for group in each.param_groups]
    ids = [id(param) for group in groups for param in group["params"]]
    assert sorted(ids) == sorted(id(param) for param in net.parameters() if param.requires_grad)
    for group in groups:
        if any(param.ndim < 2 for param in group["params"]):
            assert group["weight_decay"] == 0


def train(config, shards, folder):
    """Run a whole loop in this process; return the best weights and the metrics by epoch."""
    store = CheckpointManager(str(folder), keep=2)
    Loop(config, shards, ALONE, store, num_micro_batches=1).run()
    return load_best_weights(store)


def test_the_kept_weights_are_those_of_the_best_epoch(config, digits, tmp_path):
    weights, history = train(config, digits, tmp_path)
    net = build_net(config, digits.task)
    net.load_state_dict(weights)
    inputs, targets = digits.open("valid")
    outputs = evaluate.evaluate(net.eval(), inputs, ALONE)
    assert outputs is not None
    best = max(row["valid_accuracy"] for row in history)
    assert best > 0.9
    assert digits.task.metrics(outputs, targets, "valid")["valid_accuracy"] == best


def test_an_overflow_is_skipped_by_all_optimizers(digits, config, tmp_path):
    """One gradient is NaN, and clipping by the norm would make the others NaN."""
    changed = make_config(
        precision="fp16",
        optim={"name": "muon", "clip_norm": 1.0, "epochs": 1},
        storage={"path": config.storage.path},
    )
    store = CheckpointManager(str(tmp_path), keep=2)
    loop = Loop(changed, digits, ALONE, store, num_micro_batches=1)
    before = {name: value.clone() for name, value in loop._net.named_parameters()}
    weight = next(
        module.weight
        for module in loop._net.modules()
        if isinstance(module, torch.nn.Conv2d) and module.weight.requires_grad
    )
    handle = weight.register_hook(lambda grad: grad * math.nan)
    # A small scale, so that nothing else overflows.
    loop._scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loop._take_step(np.arange(100))
    handle.remove()
    for name, value in loop._net.named_parameters():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert loop._scaler.get_scale() == 2.0
    loop._take_step(np.arange(100))
    assert all(value.isfinite().all() for value in loop._net.parameters())


def test_evaluation_returns_every_sample_in_order(digits):
    inputs, _ = digits.open("train")
    outputs = evaluate.evaluate(lambda images: images.float().mean(dim=(1, 2)), inputs, ALONE)
    assert outputs is not None
    np.testing.assert_allclose(outputs["logits"], inputs["image"].mean(axis=(1, 2)), rtol=1e-5)


def test_a_non_finite_loss_stops_the_run_with_its_checkpoint(digits, config, tmp_path):
    diverging = make_config(
        optim={"name": "sgd", "lr": 10, "weight_decay": 1, "batch_size": 16},
        checkpoint={"every_steps": 5},
        storage={"path": config.storage.path},
    )
    with pytest.raises(
        Diverged, match=r"at step \d+ of \d+, at rate [\d.]+; lower optim.lr, now 10"
    ):
        train(diverging, digits, tmp_path)
    kept = CheckpointManager(str(tmp_path), keep=2).latest()
    assert kept is not None
    assert all(bool(value.isfinite().all()) for value in kept.tensors.values())


def test_non_finite_weights_are_not_saved(digits, config, tmp_path, monkeypatch):
    """The last update before a checkpoint may overflow although its loss is finite."""
    parts = {"checkpoint": {"every_steps": 1}, "storage": {"path": config.storage.path}}
    after_step = Loop._after_step

    def overflow(loop):
        if loop.progress.step == 3:
            next(loop._net.parameters()).data.view(-1)[0] = torch.inf
        after_step(loop)

    monkeypatch.setattr(Loop, "_after_step", overflow)
    with pytest.raises(
        Diverged, match=r"the weights 'stem\.weight' are no longer finite at step 3 of"
    ):
        train(make_config(**parts), digits, tmp_path)
    kept = CheckpointManager(str(tmp_path), keep=5)
    assert kept.steps() == [1, 2]


def test_the_loss_is_the_smoothed_cross_entropy_of_torch(config, digits, tmp_path):
    """The loss reported for one step is that of the initial net on the first batch."""
    one_step = make_config(
        optim={"epochs": 1, "batch_size": 65_536}, storage={"path": config.storage.path}
    )
    _, history = train(one_step, digits, tmp_path)
    torch.manual_seed(one_step.seed)
    net = build_net(one_step, digits.task)
    inputs, targets = digits.open("train")
    images = torch.from_numpy(np.array(inputs["image"]))
    net.fit_inputs(images)
    expected = F.cross_entropy(
        net.train()(images), torch.from_numpy(np.array(targets)), label_smoothing=0.1
    )
    assert history[0]["train_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_running_statistics_match_torch(config, digits, tmp_path):
    """With one micro-batch, the norms' buffers equal those after an ordinary forward pass."""
    one_step = make_config(
        optim={"epochs": 1, "batch_size": 65_536, "lr": 1e-9, "vector_lr": 1e-9, "head_lr": 1e-9},
        storage={"path": config.storage.path},
    )
    weights, _ = train(one_step, digits, tmp_path)
    torch.manual_seed(one_step.seed)
    net = build_net(one_step, digits.task)
    images = torch.from_numpy(np.array(digits.open("train")[0]["image"]))
    net.fit_inputs(images)
    net.train()(images)
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(weights[name], buffer, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_changes_nothing(config, digits, tmp_path):
    results = [
        train(
            make_config(
                activation_checkpointing=on,
                optim={"epochs": 1},
                storage={"path": config.storage.path},
            ),
            digits,
            tmp_path / str(on),
        )[0]
        for on in (False, True)
    ]
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-6, atol=1e-7)


def test_a_run_stops_when_its_metric_stops_improving(config, digits, tmp_path):
    stopping = make_config(
        optim={"epochs": 30, "batch_size": 64},
        stop={"metric": "valid_loss", "patience": 2},
        storage={"path": config.storage.path},
    )
    _, history = train(stopping, digits, tmp_path)
    losses = [row["valid_loss"] for row in history]
    assert len(losses) < 30
    assert int(np.argmin(losses)) == len(losses) - 3


def test_the_average_of_weights_matches_numpy(rng):
    net = torch.nn.Linear(3, 2)
    average = EMA(net, decay=0.9)
    expected = net.weight.detach().numpy().copy()
    for step in range(1, 20):
        with torch.no_grad():
            net.weight.copy_(torch.from_numpy(rng.normal(size=(2, 3))))
        average.update(net, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net.weight.detach().numpy()
    np.testing.assert_allclose(average.values["weight"].numpy(), expected, rtol=1e-5)


@pytest.fixture
def state():
    return TrainingState({"net.weight": torch.arange(6.0)}, {"step": 1})


def at(state, step):
    return TrainingState(state.tensors, {"step": step})


def test_the_latest_checkpoints_and_the_best_are_kept(state, tmp_path):
    store = CheckpointManager(str(tmp_path / "checkpoints"), keep=2)
    for step in range(1, 6):
        assert store.settle() is None
        store.save(at(state, step), best_step=2)
    store.finish()
    assert store.steps() == [2, 4, 5]


def test_a_replaced_worker_no_longer_writes_checkpoints(state, tmp_path):
    cut_off, later = (CheckpointManager(str(tmp_path), keep=2) for _ in range(2))
    owner = cut_off.hand_over()
    cut_off.claim(owner)
    cut_off.save(at(state, 1), None)
    assert cut_off.settle() is None
    later.claim(owner)
    cut_off.save(at(state, 2), None)
    with pytest.raises(Superseded, match="continued by other workers"):
        cut_off.settle()
    later.save(at(state, 3), None)
    later.finish()
    assert later.steps() == [1, 3]
    CheckpointManager(str(tmp_path), keep=2).hand_over()
    with pytest.raises(Superseded, match="another command"):
        later.claim(owner)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "digests.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_reported_and_skipped(state, tmp_path, name, damage, capsys):
    store = CheckpointManager(str(tmp_path), keep=3)
    for step in (1, 2):
        store.save(at(state, step), None)
        store.finish()
    file = tmp_path / "step-00000002" / name
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    found = store.latest()
    assert found is not None
    assert found.values["step"] == 1
    assert f"step-00000002/{name if name != 'digests.json' else ''}" in capsys.readouterr().err
