"""Plots of a training run and of its variants. Shapes: N test records, K classes."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from train.bundle.manifest import Variant
from train.metrics import Metric, calibration_error
from train.tasks import Arrays, ClassTarget, Task, ValueTarget
from train.values.ragged import Ragged, StoredArrays

MAX_NAMED_CLASSES = 30
MAX_MISTAKES = 24


def plot_curves(
    history: Sequence[Mapping[str, float]],
    metric: Metric,
    kept_epoch: float,
    rates: Sequence[float],
    path: Path,
) -> None:
    """Plot training and validation loss, the metric and the learning rate by epoch.

    kept_epoch: the epoch whose weights the model has. rates: the learning rate of each step; steps
    are spread evenly over the epochs.
    """
    epochs = [row["epoch"] for row in history]
    figure, (left, right, last) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    last.plot(np.linspace(0, epochs[-1], len(rates)), rates, color="tab:green")
    last.set(xlabel="epoch", ylabel="rate", title="Learning rate")
    left.plot(epochs, [row["train_loss"] for row in history], label="train")
    left.plot(epochs, [row["valid_loss"] for row in history], label="valid")
    left.set(xlabel="epoch", ylabel="loss", title="Loss")
    left.legend()
    values = [row[metric.name] for row in history]
    right.plot(epochs, values, color="tab:orange")
    kept = epochs.index(kept_epoch)
    right.plot(epochs[kept], values[kept], "o", color="tab:orange")
    right.annotate(
        f"{values[kept]:.4f}",
        (epochs[kept], values[kept]),
        textcoords="offset points",
        xytext=(0, -14),
        ha="right",
    )
    right.set(xlabel="epoch", ylabel=metric.name, title="Validation (dot: the model)")
    _save(figure, path)


def plot_predictions(
    task: Task,
    inputs: StoredArrays,
    targets: np.ndarray,
    outputs: Arrays,
    file: Callable[[str], Path],
) -> None:
    """Plot predictions for the test split, as suits the type of the target.

    inputs: encoded arrays [N, ...] by name. targets: encoded targets, int64 [N] classes or float32
    [N] scaled values; other targets have no plots. outputs: {"logits": float32 [N, K]}.
    file: returns the path to write for a name in the bundle.
    """
    target = task.target
    answers = target.decode(outputs)
    if isinstance(target, ClassTarget):
        probabilities_NK = answers["probabilities"]
        chosen_N, classes = target.choose(probabilities_NK), target.classes
        plot_confusion(chosen_N, targets, classes, file("report/confusion.png"))
        plot_calibration(probabilities_NK, targets, file("report/calibration.png"))
        for name in task.features.images[:1]:
            path = file("report/mistakes.png")
            confidence_N = probabilities_NK[np.arange(len(chosen_N)), chosen_N]
            plot_mistakes(inputs[name], chosen_N, confidence_N, targets, classes, path)
    elif isinstance(target, ValueTarget):
        true_N = targets * target.scale + target.mean
        plot_values(answers["value"], true_N, target.column, file("report/values.png"))


def plot_values(predicted_N: np.ndarray, true_N: np.ndarray, name: str, path: Path) -> None:
    """Plot predicted against true values, float [N] in the target's unit, and their differences."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    ends = [float(np.min(true_N)), float(np.max(true_N))]
    left.scatter(true_N, predicted_N, s=6, alpha=0.3, linewidths=0)
    left.plot(ends, ends, color="grey", linestyle="--")
    left.set(xlabel=f"true {name}", ylabel=f"predicted {name}", title="Test split")
    error_N = predicted_N - true_N
    reach = float(np.quantile(np.abs(error_N), 0.99)) or 1.0
    right.hist(np.clip(error_N, -reach, reach), bins=61, color="tab:orange")
    right.set(
        xlabel=f"predicted − true {name} (the outer bins include the largest 1 %)",
        ylabel="records",
        title=f"Median absolute error: {np.median(np.abs(error_N)):.3g}",
    )
    _save(figure, path)


def plot_confusion(
    predicted_N: np.ndarray, targets_N: np.ndarray, classes: Sequence[str], path: Path
) -> None:
    """Plot the share of each true class (row) that was predicted as each class (column).

    predicted_N, targets_N: class indices, int64 [N].
    """
    counts_KK = np.zeros((len(classes), len(classes)))
    np.add.at(counts_KK, (targets_N, predicted_N), 1)
    shares_KK = counts_KK / np.maximum(counts_KK.sum(axis=1, keepdims=True), 1)
    side = min(12.0, 3 + 0.5 * len(classes))
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    axes.imshow(shares_KK, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= MAX_NAMED_CLASSES:
        ticks = range(len(classes))
        axes.set_xticks(ticks, classes, rotation=45, ha="right")
        axes.set_yticks(ticks, classes)
        for (row, column), share in np.ndenumerate(shares_KK):
            if share >= 0.01:
                colour = "white" if share > 0.5 else "black"
                text = f"{share * 100:.0f}"
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true", title="Confusion, test split, % of the true class")
    _save(figure, path)


def plot_calibration(probabilities_NK: np.ndarray, targets_N: np.ndarray, path: Path) -> None:
    """Plot accuracy against confidence in ten bins, with the expected calibration error.

    probabilities_NK: float32 [N, K]. targets_N: class indices, int64 [N].
    """
    confidence_N = probabilities_NK.max(axis=1)
    right_N = probabilities_NK.argmax(axis=1) == targets_N
    bins_N = np.minimum((confidence_N * 10).astype(int), 9)
    counts = np.bincount(bins_N, minlength=10)
    filled = counts > 0
    confidence = np.bincount(bins_N, confidence_N, 10)[filled] / counts[filled]
    accuracy = np.bincount(bins_N, right_N, 10)[filled] / counts[filled]
    error = calibration_error(confidence_N, right_N)
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="calibrated")
    axes.plot(confidence, accuracy, "o-", label=f"test split, error {error:.3f}")
    for x, y, count in zip(confidence, accuracy, counts[filled], strict=True):
        axes.annotate(f"{count}", (x, y), textcoords="offset points", xytext=(4, -12), fontsize=8)
    axes.set(xlabel="confidence", ylabel="accuracy", title="Calibration (records in each bin)")
    axes.legend(loc="upper left")
    _save(figure, path)


def plot_mistakes(
    images_NHWC: np.ndarray | Ragged,
    predicted_N: np.ndarray,
    confidence_N: np.ndarray,
    targets_N: np.ndarray,
    classes: Sequence[str],
    path: Path,
) -> None:
    """Show the misclassified test images with the highest confidence.

    images_NHWC: uint8 [N, H, W, C], 0..255, grey or RGB. predicted_N, targets_N: class indices,
    int64 [N]. confidence_N: probability of the predicted class, float32 [N].
    """
    wrong = np.flatnonzero(predicted_N != targets_N)
    worst = wrong[np.argsort(-confidence_N[wrong])][:MAX_MISTAKES]
    rows = max(1, -(-len(worst) // 6))
    figure, axes = plt.subplots(rows, 6, figsize=(10, 0.6 + 1.9 * rows), layout="constrained")
    for place in axes.flat:
        place.axis("off")
    for place, index in zip(axes.flat, worst, strict=False):
        image = images_NHWC[index]
        place.imshow(image.squeeze(), cmap="gray" if image.shape[2] == 1 else None)
        predicted, true = classes[predicted_N[index]], classes[targets_N[index]]
        confidence = confidence_N[index]
        place.set_title(f"{predicted} {confidence:.0%},\nnot {true}", fontsize=8)
    figure.suptitle(f"Most confident errors; {len(wrong)} of {len(targets_N)} images are wrong")
    _save(figure, path)


def plot_tradeoff(
    variants: Mapping[str, Variant], metric: Metric, default: str, path: Path
) -> None:
    """Plot each variant's metric against its latency and its throughput on one thread.

    The area of a marker is proportional to the variant's size in bytes. A line connects the
    accepted variants on the Pareto frontier.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    panels = (
        (left, "ms for one record", {name: variant.p50_ms for name, variant in variants.items()}),
        (right, "records/s in batches of 32", {n: v.records_per_s for n, v in variants.items()}),
    )
    for axes, words, speeds in panels:
        faster = 1 if axes is right else -1
        for name in variants:
            _mark(axes, variants, name, speeds[name], metric.name, chosen=name == default)
        best = _frontier(variants, metric, {name: faster * x for name, x in speeds.items()})
        axes.plot(
            [speeds[name] for name in best],
            [variants[name].metrics[metric.name] for name in best],
            color="grey",
            linestyle="--",
            zorder=0,
        )
        axes.set(xscale="log", xlabel=words)
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_formatter("{x:,g}")
        axes.tick_params(axis="x", which="both", labelsize=7, labelrotation=45)
        axes.margins(0.2, 0.35)
    # Without a minimum range, tiny differences would fill the plot.
    low, high = left.get_ylim()
    middle, reach = (low + high) / 2, max((high - low) / 2, 0.01)
    left.set_ylim(middle - reach, middle + reach)
    left.set(ylabel=metric.name)
    figure.suptitle(
        "Variants (area: size in bytes; green: accepted; bold: default; dashed: best trade-offs)"
    )
    _save(figure, path)


def _frontier(
    variants: Mapping[str, Variant], metric: Metric, speeds: Mapping[str, float]
) -> list[str]:
    """Return the accepted variants that are better than every faster one, the fastest first."""
    best: list[str] = []
    for name in sorted(variants, key=lambda name: -speeds[name]):
        value = metric.signed(variants[name].metrics)
        if variants[name].accepted and (
            not best or value > metric.signed(variants[best[-1]].metrics)
        ):
            best.append(name)
    return best


def _mark(
    axes: Axes,
    variants: Mapping[str, Variant],
    name: str,
    speed: float,
    metric: str,
    *,
    chosen: bool,
) -> None:
    variant = variants[name]
    colours = {"accepted": "tab:green", "refused": "tab:red", "undecided": "tab:orange"}
    colour = colours[variant.verdict]
    largest = max(variant.size_bytes for variant in variants.values())
    point = (speed, variant.metrics[metric])
    axes.scatter(*point, s=600 * variant.size_bytes / largest, color=colour, alpha=0.6)
    axes.annotate(
        name if variant.accepted else f"{name}, {variant.verdict}",
        point,
        textcoords="offset points",
        # Rotated, so that labels of variants with equal metrics do not overlap.
        xytext=(2, 8),
        rotation=40,
        rotation_mode="anchor",
        fontsize=8,
        fontweight="bold" if chosen else "normal",
    )


def _save(figure: plt.Figure, path: Path) -> None:
    with warnings.catch_warnings():  # the font may lack glyphs of a name's script
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(path, dpi=110)
    plt.close(figure)
