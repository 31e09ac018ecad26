"""What the plots of a bundle mark."""

from pathlib import Path

from train.metrics import Metric
from train.reports import plots


def test_the_curves_mark_the_epoch_that_the_model_has(monkeypatch):
    losses, accuracies = (0.5, 0.4, 0.6), (0.7, 0.8, 0.9)
    history = [
        {"epoch": epoch, "train_loss": 0.1, "valid_loss": loss, "valid_accuracy": accuracy}
        for epoch, loss, accuracy in zip((1, 2, 3), losses, accuracies, strict=True)
    ]
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    metric = Metric("valid_accuracy", "higher")
    plots.plot_curves(history, metric, 2, [0.1, 0.1, 0.1], Path("unused"))
    _, right, _ = drawn[0].axes
    (text,) = right.texts
    assert (text.get_text(), text.xy) == ("0.8000", (2, 0.8))
