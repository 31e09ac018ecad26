"""Recipes: how each variant is made of a trained net."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cluster.errors import UserError
from train import nets
from train.bundle import Bundle, BundleWriter
from train.compress import export, weights
from train.compress.export import ExportError
from train.compress.prune import Unprunable, remove_channels
from train.compress.retrain import Retrainer
from train.compress.static import Quantizer
from train.config import Config, Net
from train.data import order
from train.data.shards import Shards, batches
from train.nets import engine
from train.nets.losses import loss_of
from train.tasks import Arrays, ClassTarget, Task

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


class Skipped(Exception):
    """A variant that cannot be made here. The message says why."""


@dataclass(frozen=True)
class Made:
    """A variant's file, and how it came to be."""

    path: Path
    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Base:
    """A net that variants are made of: the trained one, a pruned one, a student."""

    name: str
    net: nn.Module
    config: Net


class Workshop:
    """What the recipes share.

    net: the trained net. passes: whether the gate accepts a file, told by held-out records.
    earlier: a bundle of the same weights, whose variants are taken where the recipe is the same.
    """

    def __init__(
        self,
        net: nn.Module,
        config: Config,
        shards: Shards,
        writer: BundleWriter,
        scratch: Path,
        root: str,
        passes: Callable[[Path, Path], bool],
        earlier: Bundle | None = None,
    ) -> None:
        self.config, self.task, self.shards, self.scratch = config, shards.task, shards, scratch
        self.passes = passes
        self._writer, self._root, self._earlier = writer, root, earlier
        self._bases = {"fp32": Base("fp32", net, config.net)}
        self._exported: dict[str, Path | ExportError] = {}
        self._retrainer: Retrainer | None = None
        self._inputs, targets_N = shards.open("train")
        self._ids = _spread(targets_N, config, shards.task.target)

    @cached_property
    def calibration(self) -> Arrays:
        """Records to measure ranges on: drawn, all classes among them, and of extreme outputs."""
        drawn = self._ids[: self.config.compress.calibration_records]
        return _rows(self._inputs, np.union1d(drawn, self._extremes[0::2]))

    @cached_property
    def trial(self) -> Arrays:
        """Others, to compare ways of quantizing on; of data too few for both, some of the same."""
        count = self.config.compress.calibration_records
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

    def taken(self, variant: str, source: Path) -> Made:
        """A variant made elsewhere, from its ONNX file."""
        path = self.folder(variant) / "model.onnx"
        shutil.copyfile(source, path)
        return Made(path, {"key": OWN})

    def make(self, variant: str) -> Made:
        """Return a variant, made or taken from the earlier bundle. Raises Skipped."""
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
                return Made(self.folder(variant) / name, entry.recipe)
        made = RECIPES[variant](self, variant)
        return Made(made.path, {"key": key, **made.recipe})

    def folder(self, variant: str) -> Path:
        return self._writer.file(f"variants/{variant}/-").parent

    def onnx(self, base: Base) -> Path:
        """The base as ONNX in fp32. Raises ExportError, the same one each time."""
        if base.name not in self._exported:
            rows = _rows(self._inputs, np.sort(self._ids[:SAMPLE_RECORDS]))
            sample = {
                name: np.resize(array, (SAMPLE_RECORDS, *array.shape[1:]))
                for name, array in rows.items()
            }
            path = self.scratch / f"{base.name}.onnx"
            try:
                net = nets.folded(copy.deepcopy(base.net))
                export.to_onnx(net, self.task.features.inputs, sample, path)
                self._exported[base.name] = path
            except ExportError as error:
                self._exported[base.name] = error
        found = self._exported[base.name]
        if isinstance(found, ExportError):
            raise found
        return found

    def base(self, name: str) -> Base:
        """The net called fp32, pruned or distilled, trained if need be. Raises Skipped."""
        if name not in self._bases:
            self._bases[name] = {"pruned": self._prune, "distilled": self._distil}[name]()
        return self._bases[name]

    def aware(self, base: Base) -> Base:
        """The base after quantization-aware training."""
        epochs = self.config.compress.aware_epochs
        trained = self.retrainer.go_on(
            f"{base.name}-aware",
            base.config,
            base.net.state_dict(),
            epochs,
            AWARE_RATE,
            quantized=True,
        )
        net = copy.deepcopy(base.net)
        nets.resize(net, trained)
        return Base(f"{base.name}-aware", net, base.config)

    @property
    def retrainer(self) -> Retrainer:
        if self._retrainer is None:
            weights = self._bases["fp32"].net.state_dict()
            self._retrainer = Retrainer(self.config, self.shards, weights, self._root)
        return self._retrainer

    def _prune(self) -> Base:
        prune = self.config.compress.prune
        net = copy.deepcopy(self._bases["fp32"].net)
        inputs, targets_N = self.shards.open("train")
        ids = np.sort(_spread(targets_N, self.config, self.task.target)[:IMPORTANCE_RECORDS])
        tensors = tuple(torch.from_numpy(array) for array in _rows(inputs, ids).values())
        loss = loss_of(self.task.target, self.config.optim, torch.device("cpu"))
        try:
            remove_channels(net, tensors, torch.from_numpy(targets_N[ids]), loss, prune.share)
        except Unprunable as error:
            raise Skipped(str(error)) from error
        trained = self.retrainer.go_on(
            "pruned", self.config.net, net.state_dict(), prune.epochs, prune.rate
        )
        nets.resize(net, trained)
        return Base("pruned", net, self.config.net)

    def _distil(self) -> Base:
        distill, net = self.config.compress.distill, self.config.net
        if net.own is not None and distill.net is None:
            raise Skipped(f"{net.own} has no widths to halve; give --compress.distill.net.own")
        student = distill.net or net.model_copy(
            update={
                "widths": [max(width // 2, 1) for width in net.widths],
                "hidden": [max(width // 2, 1) for width in net.hidden],
                "text_width": max(net.text_width // 8 * 4, 4),
            }
        )
        try:
            built = nets.build(student, self.task)
        except ValueError as error:
            raise Skipped(f"compress.distill.net: {error}") from error
        epochs = distill.epochs or self.config.optim.epochs
        nets.resize(built, self.retrainer.distil(student, epochs))
        return Base("distilled", built, student)


# As a recipe's key: a variant that was not made here.
OWN = "own"


def _fp32(shop: Workshop, variant: str, *, base: str = "fp32") -> Made:
    """The net as it is, in ONNX; by torch where it cannot be exported."""
    found = shop.base(base)
    try:
        source = shop.onnx(found)
    except ExportError as error:
        net = nets.folded(copy.deepcopy(found.net))
        path = engine.save(net, found.config, shop.task, "fp32", shop.folder(variant))
        return Made(path, {"not_exported": str(error)})
    return Made(Path(shutil.copyfile(source, shop.folder(variant) / "model.onnx")))


def _torch(shop: Workshop, variant: str, *, precision: engine.Precision, gpu: bool) -> Made:
    if gpu and not torch.cuda.is_available():
        raise Skipped(f"{variant} is for GPUs, and this machine has none")
    base = shop.base("fp32")
    net = nets.folded(copy.deepcopy(base.net))
    return Made(engine.save(net, base.config, shop.task, precision, shop.folder(variant)))


def _of_onnx(shop: Workshop, variant: str, *, write: Callable[[Path, Path], None]) -> Made:
    path = shop.folder(variant) / "model.onnx"
    write(shop.onnx(shop.base("fp32")), path)
    return Made(path)


def _int8_static(shop: Workshop, variant: str, *, base: str = "fp32") -> Made:
    """Static int8; where that costs too much, with sensitive layers in float, then trained for it.

    What pruning or distillation cost already is not asked of quantization.
    """
    found = shop.base(base)
    reference = shop.onnx(found)
    path = shop.folder(variant) / "model.onnx"
    made = _kept_where_needed(shop, _calibrated(shop, found), reference, path)
    if made is None and shop.config.compress.aware_epochs:
        quantizer = _calibrated(shop, shop.aware(found))
        made = _kept_where_needed(shop, quantizer, reference, path)
        return Made(path, {**(made or {}), "aware_epochs": shop.config.compress.aware_epochs})
    return Made(path, made or {})


def _kept_where_needed(
    shop: Workshop, quantizer: Quantizer, reference: Path, path: Path
) -> dict[str, Any] | None:
    """Write the form with the fewest layers in float that the gate accepts, and describe it.

    None where half of the layers are not enough; all that rule the error are left in float then.
    """
    layers = quantizer.most_sensitive()
    least = len(quantizer.ruling(layers))
    counts = [least, *(2**n for n in range(len(layers)) if least < 2**n <= len(layers) // 2)]
    for count in counts:
        quantizer.write(path, layers[:count])
        if shop.passes(path, reference):
            error = quantizer.error_without(layers[:count])
            kept = {"kept_float": layers[:count]} if count else {}
            return {"calibration": quantizer.method, "error": round(error, 6), **kept}
    quantizer.write(path, layers[:least])
    return None


def _calibrated(shop: Workshop, base: Base) -> Quantizer:
    scratch = shop.scratch / f"static-{base.name}"
    scratch.mkdir(exist_ok=True)
    methods = shop.config.compress.calibration
    return Quantizer.calibrate(shop.onnx(base), scratch, shop.calibration, shop.trial, methods)


RECIPES: dict[str, Callable[[Workshop, str], Made]] = {
    "fp32": _fp32,
    "bf16": partial(_torch, precision="bf16", gpu=False),
    "fp16": partial(_torch, precision="fp16", gpu=True),
    "int8": partial(_torch, precision="int8", gpu=True),
    "fp8": partial(_torch, precision="fp8", gpu=True),
    "int8_static": _int8_static,
    "int8_dynamic": partial(_of_onnx, write=weights.int8_dynamic),
    "int8_weights": partial(_of_onnx, write=weights.int8_weights),
    "pruned": partial(_fp32, base="pruned"),
    "pruned_int8": partial(_int8_static, base="pruned"),
    "distilled": partial(_fp32, base="distilled"),
    "distilled_int8": partial(_int8_static, base="distilled"),
}


def check_calibration(config: Config, task: Task) -> None:
    """Raises UserError for a calibration that cannot see all classes."""
    least = len(task.target.classes) if isinstance(task.target, ClassTarget) else 2
    count = config.compress.calibration_records
    if count < least:
        raise UserError(
            f"compress.calibration_records is {count}, and there are {least} classes: ranges would "
            f"be those of some classes only; give at least {least}."
        )


def _spread(targets_N: np.ndarray, config: Config, target: Any) -> np.ndarray:
    """Ids of training records in an order in which all classes come soon, else at random."""
    ids = order.generator(config.seed, 0, "calib").permutation(len(targets_N))
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
    copied = nets.folded(copy.deepcopy(net)).cpu()
    row_bytes = sum(array[0].nbytes for array in inputs.values())
    size = int(np.clip(SEARCH_BYTES // row_bytes, 1, 1000))
    ids = ids[: min(MOST_SEARCHED, 50 * size)]
    parts = [
        copied(*(torch.from_numpy(array) for array in _rows(inputs, ids[part]).values()))
        for part in batches(len(ids), size)
    ]
    outputs_NK = torch.cat(parts).numpy()
    deviations_NK = np.abs(outputs_NK - outputs_NK.mean(axis=0)) / (outputs_NK.std(axis=0) + 1e-12)
    return ids[np.argsort(-deviations_NK.max(axis=1), kind="stable")[:EXTREME_RECORDS]]


def _rows(inputs: Arrays, ids: np.ndarray) -> Arrays:
    return {name: np.array(array[ids]) for name, array in inputs.items()}
