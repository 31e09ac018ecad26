"""Parts that recipes share: base networks, calibration records of shape [N, ...], earlier files."""

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
from train.bundle.engines.onnx_runtime import OnnxRuntimeEngine
from train.compress.recipes import export_onnx
from train.compress.recipes.calibration import find_extremes, spread
from train.compress.recipes.export_onnx import ExportError
from train.compress.recipes.finetune import FineTuner
from train.compress.recipes.prune import Unprunable, remove_channels
from train.config import Config, Net
from train.data.dataset import EncodedDataset
from train.nets.losses import target_loss
from train.tasks import Arrays, ClassTarget
from train.values.ragged import StoredArrays, pad, take

# Records to compare ways of quantizing on.
TRIAL_RECORDS = 512

# Records to trace an export with, and to estimate the importance of channels on.
SAMPLE_RECORDS = 32

IMPORTANCE_RECORDS = 256

# Learning rates of quantization-aware training, as a share of those in optim.
AWARE_RATE = 0.1

# Options that do not change how a variant is made; they are not part of a recipe's key.
JUDGING = {"variants", "optimize_for", "measure_seconds"}


class VariantSkipped(Exception):
    """The variant cannot be built; the message gives the reason."""


@dataclass(frozen=True)
class BuiltVariant:
    """A variant's file and the description of its recipe."""

    path: Path
    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseNet:
    """A network that variants are built from: the trained, the pruned or the distilled one.

    Of an imported model there is only its ONNX file.
    """

    name: str
    own: nn.Module | None
    config: Net

    @property
    def net(self) -> nn.Module:
        """The network in torch. Raises VariantSkipped for an imported model."""
        if self.own is None:
            raise VariantSkipped("an imported model has no network in PyTorch")
        return self.own


class VariantBuilder:
    """Builds variants and caches the parts that recipes share.

    net: the trained network, or the ONNX file of an imported model. passes: `VariantJudge.passes`.
    earlier: a bundle of the same weights; its variants with the same options are copied.
    """

    def __init__(
        self,
        net: nn.Module | Path,
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
        imported = net if isinstance(net, Path) else None
        self._bases = {"fp32": BaseNet("fp32", None if isinstance(net, Path) else net, config.net)}
        self._exported: dict[str, Path | ExportError] = {"fp32": imported} if imported else {}
        self._retrainer: FineTuner | None = None
        self._inputs, targets_N = shards.open("train")
        self._ids = spread(targets_N, config, shards.task.target)

    @cached_property
    def calibration(self) -> StoredArrays:
        """Arrays [N, ...] of calibration records: of all classes, and with extreme outputs."""
        return take(self._inputs, self._calibration_ids)

    @property
    def uncalibrated_ids(self) -> np.ndarray:
        """Indices [N] of training records that calibration does not use, in drawing order."""
        return self._ids[~np.isin(self._ids, self._calibration_ids)]

    @cached_property
    def _calibration_ids(self) -> np.ndarray:
        return np.union1d(self._ids[: self._num_drawn], self._extremes[0::2])

    @property
    def _num_drawn(self) -> int:
        """Number of drawn calibration records: at most half of all, at least one for each class."""
        target = self.task.target
        least = len(target.classes) if isinstance(target, ClassTarget) else 2
        return min(self.config.compress.calibration_records, max(len(self._ids) // 2, least))

    @cached_property
    def trial(self) -> StoredArrays:
        """Arrays [N, ...] to compare quantizations on; may overlap calibration if data are few."""
        count = self._num_drawn
        others = self._ids[count:] if len(self._ids) >= count + 2 else self._ids
        return take(self._inputs, np.union1d(others[:TRIAL_RECORDS], self._extremes[1::2]))

    @cached_property
    def _extremes(self) -> np.ndarray:
        return find_extremes(self._run, self._inputs, self._ids)

    @property
    def _run(self) -> Callable[[Arrays], np.ndarray]:
        """The model: encoded arrays [N, ...] by name → outputs [N, K]."""
        base = self._bases["fp32"]
        if base.own is None:
            engine = OnnxRuntimeEngine.load(self.onnx(base), num_threads=0)
            return lambda inputs: engine.run(inputs)["logits"]
        net = nets.folded_net(copy.deepcopy(base.own)).cpu()
        return lambda inputs: net(*map(torch.from_numpy, inputs.values())).numpy()

    @property
    def kept(self) -> list[str]:
        """Names of user-supplied variants in the earlier bundle."""
        entries = self._earlier.manifest.variants if self._earlier is not None else {}
        return [name for name, entry in entries.items() if entry.recipe.get("key") == OWN]

    def taken(self, variant: str, source: Path) -> BuiltVariant:
        """Copy a user-supplied ONNX file into the bundle."""
        path = self.folder(variant) / "model.onnx"
        shutil.copyfile(source, path)
        return BuiltVariant(path, {"key": OWN})

    def make(self, variant: str, recipe: "Recipe | None") -> BuiltVariant:
        """Build a variant, or copy it from the earlier bundle if its options are the same.

        recipe: None for user-supplied variants. Raises VariantSkipped if it cannot be built.
        """
        options = self.config.compress.model_dump(mode="json", exclude=JUDGING)
        key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]
        if self._earlier is not None:
            entry = self._earlier.manifest.variants.get(variant)
            if entry is not None and entry.recipe.get("key") in (key, OWN):
                # Copy only files that are listed in the manifest; their digests have been checked.
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
        """Return the folder of a variant in the bundle."""
        return self._writer.file(f"variants/{variant}/-").parent

    def onnx(self, base: BaseNet) -> Path:
        """Export a base network to ONNX in fp32, once. Raises ExportError, also on later calls."""
        if base.name not in self._exported:
            rows = pad(take(self._inputs, np.sort(self._ids[:SAMPLE_RECORDS])))
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
        """Return the base "fp32", "pruned" or "distilled"; train it first if needed.

        Raises VariantSkipped if it cannot be built.
        """
        if name not in self._bases:
            self._bases[name] = {"pruned": self._prune, "distilled": self._distil}[name]()
        return self._bases[name]

    def aware(self, base: BaseNet) -> BaseNet:
        """Return the base after quantization-aware training."""
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
        ids = np.sort(spread(targets_N, self.config, self.task.target)[:IMPORTANCE_RECORDS])
        tensors = tuple(torch.from_numpy(array) for array in pad(take(inputs, ids)).values())
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
                # The student of a pretrained encoder is a small net of its own.
                "pretrained": None,
                "checkpoint": None,
                "pooling": None,
                "freeze": "none",
                "lora": None,
            }
        )
        try:
            built = nets.create_net(student, self.task)
        except ValueError as error:
            raise VariantSkipped(f"compress.distill.net: {error}") from error
        nets.resize_net(built, self.retrainer.distil(student, distill.epochs))
        return BaseNet("distilled", built, student)


# Recipe key of user-supplied variants.
OWN = "own"

Recipe = Callable[["VariantBuilder", str], BuiltVariant]
