"""Fine-tuning for a variant, with the same training loop and workers as the original training."""

import hashlib
import json
import sys
from dataclasses import asdict, replace

import safetensors.torch
from torch import Tensor

from cluster import commit, storage
from train.bundle.bundle import WEIGHTS
from train.config import LAST, Augment, Checkpoint, Config, Net, Optim, Stop
from train.data.dataset import EncodedDataset
from train.data.schema.defaults import suited_defaults
from train.distributed import launcher
from train.loop.checkpoint import load_best_weights
from train.loop.run_directory import DistillationConfig, Run

Weights = dict[str, Tensor]


class FineTuner:
    """Trains networks by distillation from a trained one. Finished runs are found and reused.

    weights: those of the trained network, the teacher.
    root: the storage path. Runs are stored in its folder `train`, by the digest of the weights.
    """

    def __init__(self, config: Config, shards: EncodedDataset, weights: Weights, root: str) -> None:
        self._config, self._shards = config, shards
        self._url = storage.join_path(root, "train", f"of-{_digest(_bytes(weights))}")
        self._teacher = self._keep(weights)

    def distil(self, student: Net, epochs: int | None) -> Weights:
        """Return the weights of a new student network, trained on the teacher's outputs.

        epochs: default: as many as the teacher, or as suit the student of a pretrained encoder.
        """
        config = self._config
        if config.net.pretrained is not None and student.pretrained is None:
            # The teacher's options suit a head on vectors, or an encoder that is trained already.
            kinds = {feature.kind for feature in config.features.values()}
            count = self._shards.summary["splits"]["train"]["num_records"]
            suited = suited_defaults(kinds, count, net=student)
            optim = Optim(**suited.get("optim", {}))
            ending = {"checkpoint": Checkpoint(metric=LAST), "stop": Stop()}
            config = config.model_copy(update={"optim": optim, **ending})
        optim = _with(config.optim, epochs or config.optim.epochs, 1.0)
        config = config.model_copy(update={"net": student, "optim": optim})
        return self._train("distilled", config, self._taught())

    def go_on(
        self,
        words: str,
        net: Net,
        weights: Weights,
        epochs: int,
        rate: float,
        *,
        quantized: bool = False,
    ) -> Weights:
        """Return `weights` after more epochs of distillation from the teacher.

        words: name of the run. rate: factor for the learning rates of `optim`. quantized: whether
        to use quantization-aware training.
        """
        config = self._config.model_copy(
            update={
                "net": net,
                "optim": _with(self._config.optim, epochs, rate),
                "checkpoint": Checkpoint(metric=LAST),
                "stop": Stop(),
                # The starting weights were already trained on the stages with smaller images.
                "augment": self._config.augment.model_copy(update={"stages": Augment().stages}),
            }
        )
        lesson = replace(self._taught(), start=self._keep(weights), quantized=quantized)
        # The checkpoints of a run lack a frozen encoder.
        return {**weights, **self._train(words, config, lesson)}

    def _taught(self) -> DistillationConfig:
        distill = self._config.compress.distill
        return DistillationConfig(
            teacher=self._teacher,
            teacher_net=self._config.net.model_dump(mode="json"),
            teacher_fraction=distill.teacher_fraction,
            temperature=distill.temperature,
        )

    def _train(self, words: str, config: Config, lesson: DistillationConfig) -> Weights:
        config = config.model_copy(update={"resume": None})
        # The run's name is a digest of everything that it depends on, so that it is reused.
        options = config.model_dump(mode="json", include={"net", "optim", "augment"})
        weights = [url and url.rsplit("/", 1)[-1] for url in (lesson.start, lesson.teacher)]
        of = [options, {**asdict(lesson), "start": weights[0], "teacher": weights[1]}]
        of.append({"micro_batches": Run.count_micro_batches(config)})
        url = storage.join_path(
            self._url, f"{words}-{_digest(json.dumps(of, sort_keys=True).encode())}"
        )
        known = storage.exists(storage.join_path(url, "run.json"))
        run = Run.open(url) if known else Run.start(url, config)
        print(f"{words}: training for {config.optim.epochs} epochs", file=sys.stderr)
        launcher.train(config, run, self._shards, lesson=lesson)
        return load_best_weights(run.store(config.checkpoint.keep))[0]

    def _keep(self, weights: Weights) -> str:
        """Write weights to the storage, where workers can read them; return the folder's URL."""
        data = _bytes(weights)
        url = storage.join_path(self._url, f"weights-{_digest(data)}")
        with commit.atomic_folder(url) as folder:
            (folder / WEIGHTS).write_bytes(data)
        return url


def _bytes(weights: Weights) -> bytes:
    return safetensors.torch.save({name: value.contiguous() for name, value in weights.items()})


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


# The options of Optim that are learning rates.
RATES = ("lr", "vector_lr", "head_lr", "backbone_lr")


def _with(optim: Optim, epochs: int, rate: float) -> Optim:
    rates = {name: getattr(optim, name) * rate for name in RATES}
    return optim.model_copy(update={"epochs": epochs, **rates})
