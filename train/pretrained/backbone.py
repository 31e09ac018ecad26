"""Pretrained encoders of a run: their weights, and the vectors of a frozen one, beside the records.

Shapes: N records, B batch, D width of the encoder.
"""

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import safetensors.torch
import torch

from cluster import commit, storage
from cluster.errors import UserError
from train.bundle.bundle import WEIGHTS
from train.config import Augment, Config
from train.data import splits
from train.data.dataset import EncodedDataset, batch_slices, vectors_file
from train.loop.net_setup import build_net
from train.nets.multimodal import MultimodalNet
from train.nets.pretrained.backbones import read_weights
from train.nets.pretrained.encoder import PretrainedEncoder
from train.nets.pretrained.hub import find_checkpoint
from train.tasks import Images
from train.telemetry.work_bar import WorkBar
from train.values.ragged import Ragged, by_length

# Values per batch while their vectors are computed.
BATCH = 64
# Part of the names of folders with vectors. Increase it if they are computed differently.
VECTORS_VERSION = 2


def attach_backbone(config: Config, data: EncodedDataset) -> EncodedDataset:
    """Return the data with the weights of the run's pretrained encoder, if it has one.

    They are stored in the run's storage once, where all workers read them. The vectors of all
    texts or images are stored, too, if the encoder is frozen. Raises UserError if the files of the
    checkpoint are missing or have changed since the run began.
    """
    known = config.net.checkpoint
    if known is None:
        return data
    folder = storage.join_path(config.storage.root, "data")
    url = storage.join_path(folder, f"backbone-{known['sha256'][:20]}")
    if not storage.exists(storage.join_path(url, commit.DIGESTS)):
        assert config.net.pretrained is not None
        checkpoint = find_checkpoint(config.net.pretrained)
        if checkpoint.digest != known["sha256"]:
            raise UserError(
                f"net.pretrained is '{checkpoint.name}', whose weights have changed since this "
                "config was made; leave net.checkpoint out to use the new ones."
            )
        with commit.atomic_folder(url) as made:
            safetensors.torch.save_file(read_weights(checkpoint), made / WEIGHTS)
    backbone: dict[str, Any] = {"url": url}
    # Augmented images differ from epoch to epoch, and so do their vectors.
    if config.net.freeze == "all" and (known["kind"] != Images.kind or config.augment == Augment()):
        depends_on = [known, config.net.pooling, VECTORS_VERSION]
        key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        name = f"vectors-{data.url.rsplit('/', 1)[-1]}-{key[:20]}"
        vectors = storage.join_path(folder, name)
        if not storage.exists(storage.join_path(vectors, commit.DIGESTS)):
            _embed(config, data, url, vectors)
        backbone["vectors"] = vectors
    return replace(data, summary=data.summary | {"backbone": backbone})


def _embed(config: Config, data: EncodedDataset, weights: str, url: str) -> None:
    """Write the vectors of all splits, float32 [N, D] each, to the folder `url`."""
    net = build_net(config, data.task)
    assert isinstance(net, MultimodalNet)
    encoders = {
        spec.name: encoder
        for spec, encoder in zip(data.task.features.inputs, net.encoders, strict=True)
        if isinstance(encoder, PretrainedEncoder)
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = commit.fetch(weights, last=commit.DIGESTS) / WEIGHTS
    for encoder in encoders.values():
        encoder.load_backbone(safetensors.torch.load_file(path))
        encoder.eval().to(device)
    opened = {split: data.open(split)[0] for split in splits.NAMES}
    total = sum(len(inputs[name]) for inputs in opened.values() for name in encoders)
    with commit.atomic_folder(url) as folder, WorkBar("embedding", total, "values") as bar:
        for split, inputs in opened.items():
            for name, encoder in encoders.items():
                vectors_ND = _vectors(encoder, inputs[name], device, bar)
                np.save(folder / vectors_file(data.task, split, name), vectors_ND)


@torch.inference_mode()
def _vectors(
    encoder: PretrainedEncoder, values: np.ndarray | Ragged, device: torch.device, bar: WorkBar
) -> np.ndarray:
    found_ND = np.empty((len(values), encoder.width), np.float32)
    # Texts of about the same length are embedded together.
    order_N = by_length({"": values})
    if order_N is None:
        order_N = np.arange(len(values))
    for rows in batch_slices(len(values), BATCH):
        ids_B = order_N[rows]
        found_ND[ids_B] = encoder.embed(torch.from_numpy(values[ids_B]).to(device)).cpu().numpy()
        bar.advance(len(ids_B))
    return found_ND
