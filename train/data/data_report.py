"""Data report: statistics and warnings about the records, as text and as a plot.

Shapes: N records.
"""

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.data.fit_notes import fit_notes, format_share, missing_shares
from train.data.preprocess import EncodedBlock
from train.data.splits import NAMES, TEST, TRAIN, VALID
from train.tasks import Columns, Images, NamedTarget, Task, Texts, ValueTarget
from train.values.ragged import Ragged, lengths_of

REPORT, PICTURE = "report.txt", "report.png"
# A column that alone reaches this accuracy or R² on unseen records probably leaks the target.
SUSPECT_ACCURACY, SUSPECT_R2 = 0.98, 0.9
MAX_LEAVES = 256
MAX_ROWS_TRIED = 20_000
MAX_BAD_KEPT = 1000
MAX_CLASSES_SHOWN = 12


class DataReport:
    """Statistics of the records, collected while they are encoded."""

    def __init__(self, task: Task, sample: Columns, notes: Sequence[str] = ()) -> None:
        """sample: the training records that the features were fitted on.

        notes: further lines for the report, printed before those of `fit_notes`.
        """
        self._task, self._notes = task, [*notes, *fit_notes(task, sample)]
        self._columns = {
            column: {"missing": share} for column, share in missing_shares(task, sample).items()
        }
        # A missing image of an optional column is encoded as a black one, so black ones count.
        optional = [each for each in task.features.encoders if isinstance(each, Images)]
        self._black = {each.column: 0 for each in optional if each.optional}
        self._texts = [each for each in task.features.encoders if isinstance(each, Texts)]
        self._num_long = 0
        self._num_records = 0
        self._suspects = leakage_suspects(task, sample)
        self._digests: dict[int, list[np.ndarray]] = {TRAIN: [], VALID: [], TEST: []}
        self._targets: list[np.ndarray] = []
        self._counts: np.ndarray | int = 0
        self.num_bad = 0
        self.bad: list[tuple[str, str]] = []

    def add(self, encoded: EncodedBlock, codes_N: np.ndarray) -> None:
        """Add encoded records. codes_N: int8 [N], the split of each: TRAIN, VALID or TEST."""
        self.num_bad += len(encoded.bad)
        self.bad += encoded.bad[: MAX_BAD_KEPT - len(self.bad)]
        for code, found in self._digests.items():
            found.append(encoded.digests_N[codes_N == code])
        targets_N = encoded.targets_N[codes_N == TRAIN]
        if isinstance(self._task.target, ValueTarget):
            self._targets.append(targets_N)
        elif isinstance(self._task.target, NamedTarget):  # custom targets have no class counts
            self._counts = self._counts + _counted(self._task.target, targets_N)
        self._num_records += len(encoded.rows_N)
        for encoder in self._texts:
            lengths_N = lengths_of({encoder.kind: encoded.inputs[encoder.kind]})
            assert lengths_N is not None
            self._num_long += int(np.sum(lengths_N >= encoder.max_tokens))
        for name in self._black:
            # The darkest value of images that differ in height is 1.
            images = encoded.inputs[name]
            darkest = int(isinstance(images, Ragged))
            self._black[name] += sum(
                bool(images[row].max() <= darkest) for row in range(len(images))
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON data; `report_text` turns it into text."""
        train_N, valid_N, test_N = (np.concatenate(self._digests[code]) for code in range(3))
        return {
            "columns": self._columns
            | {
                name: {"missing": count / max(self._num_records, 1)}
                for name, count in self._black.items()
            },
            "target": self._target(),
            "duplicates": {
                "within train": int(len(train_N) - len(np.unique(train_N))),
                "valid in train": int(np.isin(valid_N, train_N).sum()),
                "test in train": int(np.isin(test_N, train_N).sum()),
            },
            "leakage_suspects": self._suspects,
            "notes": [*self._notes, *self._long_texts()],
            "num_bad": self.num_bad,
            "bad": [list(item) for item in self.bad],
        }

    def _long_texts(self) -> list[str]:
        """Return a note on records whose texts may have been cut; none if there are none."""
        if not self._num_long:
            return []
        share = format_share(self._num_long / self._num_records)
        return [
            f"texts: {self._num_long:,} records ({share}) have at least text.max_tokens "
            f"({self._texts[0].max_tokens}) tokens; further tokens are cut off"
        ]

    def _target(self) -> dict[str, Any]:
        target = self._task.target
        if isinstance(target, ValueTarget):
            values_N = np.concatenate(self._targets) * target.scale + target.mean
            quantiles = np.quantile(values_N, [0, 0.25, 0.5, 0.75, 1]).tolist()
            return {"quantiles": quantiles, "mean": float(values_N.mean())}
        classes = target.classes if isinstance(target, NamedTarget) else ()
        counts = np.broadcast_to(self._counts, len(classes)).tolist()
        return {"counts": dict(zip(classes, counts, strict=True))}

    def write(self, folder: Path, counts: Mapping[str, Mapping[str, Any]]) -> None:
        """Write REPORT and PICTURE. counts: {split: {"num_records": int, …}}."""
        facts = self.to_dict()
        words = report_text(facts, {name: counts[name]["num_records"] for name in NAMES})
        (folder / REPORT).write_text(words + "\n")
        plot_report(facts, self._task.target.column, folder / PICTURE)


def report_text(facts: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """Return the report as text.

    facts: from `DataReport.to_dict`. counts: number of records in each split.
    """
    lines = ["records: " + ", ".join(f"{count:,} {name}" for name, count in counts.items())]
    target = facts["target"]
    if "quantiles" in target:
        low, _, middle, _, high = target["quantiles"]
        lines.append(f"target: from {low:.4g} to {high:.4g}, median {middle:.4g}")
    elif target["counts"]:
        shown = list(target["counts"].items())
        words = ", ".join(f"{name} {count:,}" for name, count in shown[:MAX_CLASSES_SHOWN])
        more = f" and {len(shown) - MAX_CLASSES_SHOWN} more" if shown[MAX_CLASSES_SHOWN:] else ""
        lines.append(f"target: {words}{more}")
    missing = {
        name: column["missing"] for name, column in facts["columns"].items() if column["missing"]
    }
    if missing:
        ranked = sorted(missing.items(), key=lambda item: -item[1])
        lines.append(
            "missing: " + ", ".join(f"{name} {format_share(share)}" for name, share in ranked[:12])
        )
    for name, count in facts["duplicates"].items():
        if count:
            lines.append(f"duplicates ({name}): {count:,} records repeat another record's inputs")
    for note in facts["notes"]:
        lines += textwrap.wrap(note, 100, subsequent_indent="  ")
    for name, value in facts["leakage_suspects"].items():
        lines.append(
            f"leakage? '{name}' alone predicts the target (score {value:.3f}); if it is unknown "
            "at prediction time, remove it from features or add it to --data.drop"
        )
    if facts["num_bad"]:
        place, reason = facts["bad"][0]
        lines.append(f"dropped: {facts['num_bad']:,} bad records; the first is {place}: {reason}")
    return "\n".join(lines)


def plot_report(facts: Mapping[str, Any], column: str, path: Path) -> None:
    """Plot the distribution of the target and the missing share of each column."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    names = list(facts["columns"])[:40]
    height = max(3.5, 0.25 * len(names) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), layout="constrained")
    target = facts["target"]
    if "quantiles" in target:
        low, first, middle, third, high = target["quantiles"]
        box = {"med": middle, "q1": first, "q3": third, "whislo": low, "whishi": high}
        left.bxp([box], showfliers=False)
        left.set_xticks([1], [column])
    else:
        counts = dict(list(target["counts"].items())[:40])
        left.barh(list(counts), list(counts.values()), color="tab:blue")
        left.invert_yaxis()
        left.set_xlabel("training records")
    left.set_title(f"Target: {column}")
    shares = [100 * facts["columns"][name]["missing"] for name in names]
    colours = ["tab:red" if name in facts["leakage_suspects"] else "tab:grey" for name in names]
    right.barh(names, shares, color=colours)
    right.set(
        xlim=(0, max(5.0, 1.1 * max(shares))),
        xlabel="% missing" + (" (red: leakage suspects)" if facts["leakage_suspects"] else ""),
        title="Columns",
    )
    for label in right.get_yticklabels():
        if label.get_text() in facts["leakage_suspects"]:
            label.set_color("tab:red")
    right.invert_yaxis()
    with warnings.catch_warnings():  # matplotlib's font lacks the glyphs of some scripts
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(path, dpi=110)
    plt.close(figure)


def leakage_suspects(task: Task, sample: Columns) -> dict[str, float]:
    """Return the columns that alone predict the target, each with its accuracy or R².

    A small decision tree per column is fitted to one half of the sample and scored on the other.
    Images and texts are not tested.
    """
    from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

    found: dict[str, float] = {}
    count = min(len(sample[task.target.column]), MAX_ROWS_TRIED)
    head = {name: values[:count] for name, values in sample.items() if len(values) >= count}
    targets_N = task.target.encode(head[task.target.column])
    half = count // 2
    if half < 20 or targets_N.ndim > 1:
        return found
    # A custom target may have numbers, too.
    regression = isinstance(task.target, ValueTarget) or targets_N.dtype.kind == "f"
    tree = DecisionTreeRegressor if regression else DecisionTreeClassifier
    # Predicting the most frequent class alone scores `usual`. If that is high, a column is
    # suspect only if it halves the remaining errors.
    usual = 0.0 if regression else _usual(targets_N[half:])
    limit = SUSPECT_R2 if regression else max(SUSPECT_ACCURACY, (1 + usual) / 2)
    for encoder in task.features.encoders:
        if encoder.to_dict()["kind"] not in ("numbers", "categories"):
            continue
        (values_NF,) = encoder.encode(head).values()
        names = getattr(encoder, "owners", None) or [field.name for field in encoder.fields]
        for name, values_N in zip(names, np.nan_to_num(values_NF, nan=-1e9).T, strict=True):
            fitted = tree(max_leaf_nodes=MAX_LEAVES, random_state=0).fit(
                values_N[:half, None], targets_N[:half]
            )
            score = float(fitted.score(values_N[half:, None], targets_N[half:]))
            if score >= limit:
                found[name] = max(score, found.get(name, 0.0))
    return found


def _counted(target: NamedTarget, targets_N: np.ndarray) -> np.ndarray:
    """Return the number of records of each class or label."""
    if targets_N.ndim == 2:
        return targets_N.sum(axis=0, dtype=np.int64)
    return np.bincount(targets_N, minlength=len(target.classes))


def _usual(targets_N: np.ndarray) -> float:
    """Return the share of the most frequent class."""
    return float(np.unique(targets_N, return_counts=True)[1].max() / len(targets_N))
