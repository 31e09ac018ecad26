"""Prepare a network for training: build it, fit it to its inputs, move it to its device.

Shapes: N training records, B samples of a batch; inputs are by name, each with further axes.
"""

from collections.abc import Mapping

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from cluster import commit
from cluster.errors import error_line
from train import nets
from train.bundle.bundle import WEIGHTS
from train.config import Config, Stage
from train.data import batch_sampler
from train.data.augment import Augmentation
from train.data.dataset import EncodedDataset
from train.loop import parallelism
from train.loop.parallelism import Worker
from train.nets.pretrained.encoder import PretrainedEncoder
from train.tasks import Task
from train.telemetry import efficiency
from train.values.ragged import Ragged, StoredArrays, lengths_of
from train.values.records import num_rows

# Samples on which a network fits its normalisation and its whitening stem: most, fewest, and bytes
# in all. Large samples are limited by bytes, because fitting needs hundreds of times as many.
FIT_SAMPLES, FIT_LEAST_SAMPLES, FIT_BYTES = 50_000, 32, 5000 * 32 * 32 * 3


def build_net(config: Config, task: Task) -> nn.Module:
    """Return the task's network with initial weights.

    Raises ValueError if the data do not fit the network.
    """
    smallest = min(stage.side for stage in config.augment.stages)
    return nets.create_net(config.net, task, smallest)


def prepared(config: Config, shards: EncodedDataset) -> EncodedDataset:
    """Return the records that the network is trained on: vectors where an encoder is frozen."""
    frozen = config.net.checkpoint is not None and config.net.freeze == "all"
    has_vectors = "vectors" in shards.summary.get("backbone", {})
    return shards.embedded() if frozen and has_vectors else shards


def load_backbone(net: nn.Module, shards: EncodedDataset) -> None:
    """Load the weights of a pretrained encoder into a network that has one."""
    for encoder in _encoders(net):
        folder = commit.fetch(shards.summary["backbone"]["url"], last=commit.DIGESTS)
        encoder.load_backbone(safetensors.torch.load_file(folder / WEIGHTS))


def drop_backbone(net: nn.Module, shards: EncodedDataset) -> None:
    """Remove a frozen encoder whose vectors are the inputs, so that it is in no checkpoint."""
    if shards.summary.get("embedded"):
        for encoder in _encoders(net):
            encoder.backbone = nn.Identity()


def load_trained(net: nn.Module, weights: Mapping[str, Tensor], shards: EncodedDataset) -> None:
    """Load the weights of a finished run into the run's network, frozen encoder included.

    weights: by name, with the shapes of the network. Those of a frozen encoder are missing if the
    run was given its vectors.
    """
    missing = net.state_dict().keys() - weights.keys()
    if missing and "backbone" in shards.summary:
        load_backbone(net, shards)
        weights = {**net.state_dict(), **weights}
    net.load_state_dict(weights)


def _encoders(net: nn.Module) -> list[PretrainedEncoder]:
    return [each for each in net.modules() if isinstance(each, PretrainedEncoder)]


def check_custom_net(net: nn.Module, config: Config, task: Task, inputs: StoredArrays) -> None:
    """Fit a custom network to its inputs, and run it on two training records, on the CPU.

    inputs: of the training split, [N, …] each. Raises ValueError, which names the inputs, if the
    network fails or does not return [2, num_outputs].
    """
    ids = np.arange(min(2, num_rows(inputs)))
    given = device_inputs(inputs, ids, torch.device("cpu"))
    words = ", ".join(
        f"{name} {str(each.dtype).removeprefix('torch.')} {list(each.shape)}"
        for name, each in zip(inputs, given, strict=True)
    )
    what = f"net.class_path is '{config.net.class_path}', whose network, given {words},"
    try:
        fit_inputs(net, config, inputs)
        with torch.no_grad():
            outputs = net.eval()(*given)
    except Exception as error:
        raise ValueError(f"{what} fails: {error_line(error)}") from error
    wanted = (len(ids), task.target.num_outputs)
    if not isinstance(outputs, Tensor) or outputs.shape != wanted:
        found = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"{what} returns {found}; expected {list(wanted)}")


def fit_inputs(net: nn.Module, config: Config, inputs: StoredArrays) -> None:
    """Let a network set its normalisation from a sample of the training records.

    inputs: of the training split, [N, …] each.
    """
    if hasattr(net, "fit_inputs"):
        count = num_rows(inputs)
        draws = batch_sampler.random_stream(config.seed, 0, "fit").permutation(count)
        row_bytes = max(sum(array[0].nbytes for array in inputs.values()), 1)
        fitting = int(np.clip(FIT_BYTES // row_bytes, FIT_LEAST_SAMPLES, FIT_SAMPLES))
        ids = np.sort(draws[:fitting])
        net.fit_inputs(*device_inputs(inputs, ids, torch.device("cpu")))  # type: ignore[operator]


def place_net(net: nn.Module, config: Config, worker: Worker) -> nn.Module:
    """Move a network to the worker's device, whole or in shards."""
    sharded = config.workers.parallel == "fsdp"
    if not sharded:  # FSDP accepts only contiguous weights
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net = net.to(worker.device)
    if config.activation_checkpointing:
        parallelism.checkpoint_activations(net)
    if sharded:
        parallelism.shard_net(net, worker)
    return net


def flops_per_sample(
    net: nn.Module,
    config: Config,
    inputs: StoredArrays,
    worker: Worker,
    augmentation: Augmentation,
) -> dict[Stage, float]:
    """Return the FLOPs of a sample's forward and backward pass by stage; {} for a sharded network.

    inputs: of the training split, [N, …] each. Of samples that differ in length, the one whose
    length is nearest to the mean is measured.
    """
    if config.workers.parallel != "ddp":
        return {}
    lengths_N = lengths_of(inputs)
    typical = 0 if lengths_N is None else np.abs(lengths_N - lengths_N.mean()).argmin()
    one = np.array([typical])
    augmentation.start_epoch(0)
    return {
        stage: efficiency.training_flops(
            net, augmented_inputs(inputs, one, worker, augmentation, stage)
        )
        for stage in config.augment.stages
    }


def augmented_inputs(
    inputs: StoredArrays,
    ids_B: np.ndarray,
    worker: Worker,
    augmentation: Augmentation,
    stage: Stage,
) -> list[Tensor]:
    """Return the inputs of some samples as tensors, [B, …] each, with augmented images.

    inputs: of the training split, [N, …] each. ids_B: int64 [B], indices of the samples.
    """
    tensors = device_inputs(inputs, ids_B, worker.device)
    for place, (name, stored) in enumerate(inputs.items()):
        if name in augmentation.images:
            heights_B = stored.lengths_N[ids_B] if isinstance(stored, Ragged) else None
            tensors[place] = augmentation.apply(tensors[place], ids_B, stage, heights_B)
    return tensors


def device_inputs(inputs: StoredArrays, ids_B: np.ndarray, device: torch.device) -> list[Tensor]:
    """Return the inputs of some samples as tensors on `device`, [B, …] each.

    inputs: of a split, [N, …] each. ids_B: int64 [B], indices of the samples.
    """
    return [torch.from_numpy(array[ids_B]).to(device) for array in inputs.values()]
