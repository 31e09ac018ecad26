"""Pictures of a training run and of its variants."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from train.bundle.manifest import Variant

MAX_NAMED_CLASSES = 30


def curves(history: Sequence[Mapping[str, float]], metric: str, path: Path) -> None:
    """Loss of training and validation, and the metric, by epoch."""
    epochs = [row["epoch"] for row in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(epochs, [row["train_loss"] for row in history], label="train")
    left.plot(epochs, [row["valid_loss"] for row in history], label="valid")
    left.set(xlabel="epoch", ylabel="loss (nats)", title="Loss")
    left.legend()
    values = [row[metric] for row in history]
    right.plot(epochs, values, color="tab:orange")
    best = int(np.argmax(values))
    right.plot(epochs[best], values[best], "o", color="tab:orange")
    right.annotate(
        f"{values[best]:.4f}",
        (epochs[best], values[best]),
        textcoords="offset points",
        xytext=(0, -14),
        ha="right",
    )
    right.set(xlabel="epoch", ylabel=metric, title="Validation")
    _save(figure, path)


def confusion(
    predicted_N: np.ndarray, targets_N: np.ndarray, classes: Sequence[str], path: Path
) -> None:
    """Share of each true class (row) that was predicted as each class (column)."""
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
    axes.set(xlabel="predicted", ylabel="true", title="Test split, % of the true class")
    _save(figure, path)


def tradeoff(variants: Mapping[str, Variant], metric: str, default: str, path: Path) -> None:
    """Each variant's metric against its throughput; the marker's area is its size in bytes."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    largest = max(variant.size_bytes for variant in variants.values())
    for name, variant in variants.items():
        _mark(axes, name, variant, metric, largest, chosen=name == default)
    axes.margins(0.3)
    # Without a least span, the smallest difference would fill the picture.
    low, high = axes.get_ylim()
    middle, reach = (low + high) / 2, max((high - low) / 2, 0.02)
    axes.set_ylim(middle - reach, middle + reach)
    axes.set(
        xlabel="records/s, one thread, batch 32", ylabel=metric, title="Variants (area: bytes)"
    )
    _save(figure, path)


def _mark(
    axes: Axes, name: str, variant: Variant, metric: str, largest: int, *, chosen: bool
) -> None:
    colour = "tab:green" if variant.accepted else "tab:red"
    point = (variant.records_per_s, variant.metrics[metric])
    axes.scatter(*point, s=600 * variant.size_bytes / largest, color=colour, alpha=0.6)
    words = [name, *(["default"] if chosen else []), *([] if variant.accepted else ["refused"])]
    axes.annotate(", ".join(words), point, textcoords="offset points", xytext=(0, 16), ha="center")


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
