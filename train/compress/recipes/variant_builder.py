"""The parts that recipes share: base nets, calibration records, files of earlier bundles."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from train import nets
from train.bundle import Bundle, BundleWriter
from train.compress.recipes import export_onnx
from train.compress.recipes.export_onnx import ExportError
from train.compress.recipes.finetune import FineTuner
from train.compress.recipes.prune import Unprunable, remove_channels
from train.config import Config, Net
from train.data import batch_sampler
from train.data.dataset import EncodedDataset, batch_slices
from train.nets.losses import target_loss
from train.tasks import Arrays, ClassTarget

TRIAL_RECORDS = 512

# Records with extreme outputs, to calibrate on beside those drawn; among how many they are sought.
EXTREME_RECORDS, MOST_SEARCHED = 64, 50_000

# They are sought in batches of so many bytes: a net makes hundreds of times as many of them.
SEARCH_BYTES = 2**20

SAMPLE_RECORDS = 32

IMPORTANCE_RECORDS = 256

# Rates of quantization-aware training, as a share of those in optim.
AWARE_RATE = 0.1

# Options that change how variants are judged, not how they are made.
JUDGING = {"variants", "optimize_for", "measure_seconds"}


class VariantSkipped(Exception):
    """A variant that cannot be made here. The message says why."""


@dataclass(frozen=True)
class BuiltVariant:
    """A variant's file, and how it came to be."""

    path: Path
    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseNet:
    """A net that variants are made of: the trained one, a pruned one, a student."""

    name: str
    net: nn.Module
    config: Net


class VariantBuilder:
    """What the recipes share.

    net: the trained net. passes: whether the gate accepts a file beside another; trained: whether
    it went on learning from the training records.
    earlier: a bundle of the same weights, whose variants are taken where the recipe is the same.
    """

    def __init__(
        self,
        net: nn.Module,
        config: Config,
        shards: EncodedDataset,
        writer: BundleWriter,
        scratch: Path,
        root: str,
        passes: Callable[[Path, Path, bool], bool],
        earlier: Bundle | None = None,
    ) -> None:
        self.config, self.task, self.shards, self.scratch = config, shards.task, shards, scratch
        self.passes = passes
        self._writer, self._root, self._earlier = writer, root, earlier
        self._bases = {"fp32": BaseNet("fp32", net, config.net)}
        self._exported: dict[str, Path | ExportError] = {}
        self._retrainer: FineTuner | None = None
        self._inputs, targets_N = shards.open("train")
        self._ids = _spread(targets_N, config, shards.task.target)

    @cached_property
    def calibration(self) -> Arrays:
        """Records to measure ranges on: drawn, all classes among them, and of extreme outputs."""
        return _rows(self._inputs, self._calibration_ids)

    @property
    def uncalibrated_ids(self) -> np.ndarray:
        """Training records that no range is measured on, in their order of drawing."""
        return self._ids[~np.isin(self._ids, self._calibration_ids)]

    @cached_property
    def _calibration_ids(self) -> np.ndarray:
        return np.union1d(self._ids[: self._num_drawn], self._extremes[0::2])

    @property
    def _num_drawn(self) -> int:
        """At most half of the training records, but one of each class."""
        target = self.task.target
        least = len(target.classes) if isinstance(target, ClassTarget) else 2
        return min(self.config.compress.calibration_records, max(len(self._ids) // 2, least))

    @cached_property
    def trial(self) -> Arrays:
        """Others, to compare ways of quantizing on; of data too few for both, some of the same."""
        count = self._num_drawn
        others = self._ids[count:] if len(self._ids) >= count + 2 else self._ids
        return _rows(self._inputs, np.union1d(others[:TRIAL_RECORDS], self._extremes[1::2]))

    @cached_property
    def _extremes(self) -> np.ndarray:
        return _extremes(self._bases["fp32"].net, self._inputs, self._ids)

    @property
    def kept(self) -> list[str]:
        """Variants made elsewhere that the earlier bundle has."""
        entries = self._earlier.manifest.variants if self._earlier is not None else {}
        return [name for name, entry in entries.items() if entry.recipe.get("key") == OWN]

    def taken(self, variant: str, source: Path) -> BuiltVariant:
        """A variant made elsewhere, from its ONNX file."""
        path = self.folder(variant) / "model.onnx"
        shutil.copyfile(source, path)
        return BuiltVariant(path, {"key": OWN})

    def make(self, variant: str, recipe: "Recipe | None") -> BuiltVariant:
        """Return a variant, made by a recipe or taken from the earlier bundle.

        recipe: None for a variant that the earlier bundle has. Raises VariantSkipped.
        """
        options = self.config.compress.model_dump(mode="json", exclude=JUDGING)
        key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]
        if self._earlier is not None:
            entry = self._earlier.manifest.variants.get(variant)
            if entry is not None and entry.recipe.get("key") in (key, OWN):
                # Only what the manifest lists, and has been checked.
                parent, _, name = entry.file.rpartition("/")
                for file in self._earlier.manifest.files:
                    if file.startswith(f"{parent}/"):
                        target = self.folder(variant) / file.removeprefix(f"{parent}/")
                        target.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(self._earlier.path / file, target)
                return BuiltVariant(self.folder(variant) / name, entry.recipe)
        assert recipe is not None
        made = recipe(self, variant)
        return BuiltVariant(made.path, {"key": key, **made.recipe})

    def folder(self, variant: str) -> Path:
        return self._writer.file(f"variants/{variant}/-").parent

    def onnx(self, base: BaseNet) -> Path:
        """The base as ONNX in fp32. Raises ExportError, the same one each time."""
        if base.name not in self._exported:
            rows = _rows(self._inputs, np.sort(self._ids[:SAMPLE_RECORDS]))
            sample = {
                name: np.resize(array, (SAMPLE_RECORDS, *array.shape[1:]))
                for name, array in rows.items()
            }
            path = self.scratch / f"{base.name}.onnx"
            try:
                net = nets.folded_net(copy.deepcopy(base.net))
                export_onnx.to_onnx(net, self.task.features.inputs, sample, path)
                self._exported[base.name] = path
            except ExportError as error:
                self._exported[base.name] = error
        found = self._exported[base.name]
        if isinstance(found, ExportError):
            raise found
        return found

    def base(self, name: str) -> BaseNet:
        """The net called fp32, pruned or distilled, trained if need be. Raises VariantSkipped."""
        if name not in self._bases:
            self._bases[name] = {"pruned": self._prune, "distilled": self._distil}[name]()
        return self._bases[name]

    def aware(self, base: BaseNet) -> BaseNet:
        """The base after quantization-aware training."""
        epochs = self.config.compress.qat_epochs
        trained = self.retrainer.go_on(
            f"{base.name}-aware",
            base.config,
            base.net.state_dict(),
            epochs,
            AWARE_RATE,
            quantized=True,
        )
        net = copy.deepcopy(base.net)
        nets.resize_net(net, trained)
        return BaseNet(f"{base.name}-aware", net, base.config)

    @property
    def retrainer(self) -> FineTuner:
        if self._retrainer is None:
            weights = self._bases["fp32"].net.state_dict()
            self._retrainer = FineTuner(self.config, self.shards, weights, self._root)
        return self._retrainer

    def _prune(self) -> BaseNet:
        prune = self.config.compress.prune
        net = copy.deepcopy(self._bases["fp32"].net)
        inputs, targets_N = self.shards.open("train")
        ids = np.sort(_spread(targets_N, self.config, self.task.target)[:IMPORTANCE_RECORDS])
        tensors = tuple(torch.from_numpy(array) for array in _rows(inputs, ids).values())
        loss = target_loss(self.task.target, self.config.optim, torch.device("cpu"))
        try:
            remove_channels(net, tensors, torch.from_numpy(targets_N[ids]), loss, prune.fraction)
        except Unprunable as error:
            raise VariantSkipped(str(error)) from error
        trained = self.retrainer.go_on(
            "pruned", self.config.net, net.state_dict(), prune.epochs, prune.rate
        )
        nets.resize_net(net, trained)
        return BaseNet("pruned", net, self.config.net)

    def _distil(self) -> BaseNet:
        distill, net = self.config.compress.distill, self.config.net
        if net.class_path is not None and distill.net is None:
            raise VariantSkipped(
                f"{net.class_path} has no widths to halve; give --compress.distill.net.class_path"
            )
        student = distill.net or net.model_copy(
            update={
                "widths": [max(width // 2, 1) for width in net.widths],
                "hidden": [max(width // 2, 1) for width in net.hidden],
                "text_width": max(net.text_width // 8 * 4, 4),
            }
        )
        try:
            built = nets.create_net(student, self.task)
        except ValueError as error:
            raise VariantSkipped(f"compress.distill.net: {error}") from error
        epochs = distill.epochs or self.config.optim.epochs
        nets.resize_net(built, self.retrainer.distil(student, epochs))
        return BaseNet("distilled", built, student)


# As a recipe's key: a variant that was not made here.
OWN = "own"

Recipe = Callable[["VariantBuilder", str], BuiltVariant]


def _spread(targets_N: np.ndarray, config: Config, target: Any) -> np.ndarray:
    """Ids of training records in an order in which all classes come soon, else at random."""
    ids = batch_sampler.random_stream(config.seed, 0, "calib").permutation(len(targets_N))
    if not isinstance(target, ClassTarget):
        return ids
    first = np.unique(targets_N[ids], return_index=True)[1]
    return np.concatenate([ids[first], np.delete(ids, first)])


@torch.inference_mode()
def _extremes(net: nn.Module, inputs: Arrays, ids: np.ndarray) -> np.ndarray:
    """Ids of the records whose outputs are farthest from the mean, the farthest first.

    Numbers have no bounds, and a range that was measured without the largest would cut them off.
    None where all inputs are bounded.
    """
    if all(array.dtype != np.float32 for array in inputs.values()):
        return ids[:0]
    copied = nets.folded_net(copy.deepcopy(net)).cpu()
    row_bytes = sum(array[0].nbytes for array in inputs.values())
    size = int(np.clip(SEARCH_BYTES // row_bytes, 1, 1000))
    ids = ids[: min(MOST_SEARCHED, 50 * size)]
    parts = [
        copied(*(torch.from_numpy(array) for array in _rows(inputs, ids[part]).values()))
        for part in batch_slices(len(ids), size)
    ]
    outputs_NK = torch.cat(parts).numpy()
    deviations_NK = np.abs(outputs_NK - outputs_NK.mean(axis=0)) / (outputs_NK.std(axis=0) + 1e-12)
    return ids[np.argsort(-deviations_NK.max(axis=1), kind="stable")[:EXTREME_RECORDS]]


def _rows(inputs: Arrays, ids: np.ndarray) -> Arrays:
    return {name: np.array(array[ids]) for name, array in inputs.items()}
