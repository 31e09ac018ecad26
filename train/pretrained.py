"""Pretrained encoders of a run: their weights, and the vectors of a frozen one, beside the records.

Shapes: N records, B batch, L tokens, D width of the encoder.
"""

from dataclasses import replace

import numpy as np
import safetensors.torch
import torch

from cluster import commit, storage
from cluster.errors import UserError
from train.bundle.bundle import WEIGHTS
from train.config import Config
from train.data import splits
from train.data.dataset import EncodedDataset, batch_slices
from train.nets.pretrained.checkpoints import find_checkpoint
from train.nets.pretrained.text import PretrainedText, read_weights
from train.tasks import Texts
from train.telemetry.work_bar import WorkBar
from train.values.ragged import Ragged, by_length

# Texts per batch while their vectors are computed.
BATCH = 64
# Part of the names of folders with vectors. Increase it if they are computed differently.
VECTORS_VERSION = 1


def attach_backbone(config: Config, data: EncodedDataset) -> EncodedDataset:
    """Return the data with the weights of the run's pretrained encoder, if it has one.

    They are stored in the run's storage once, where all workers read them. The vectors of all texts
    are stored, too, if the encoder is frozen. Raises UserError if the files of the checkpoint are
    missing or have changed since the run began.
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
    backbone = {"url": url}
    if config.net.freeze == "all":
        pooling = config.net.pooling or known["pooling"]
        name = f"vectors-{data.url.rsplit('/', 1)[-1]}-{known['sha256'][:12]}-{pooling}"
        vectors = storage.join_path(folder, f"{name}-{VECTORS_VERSION}")
        if not storage.exists(storage.join_path(vectors, commit.DIGESTS)):
            _embed(config, data, url, vectors)
        backbone["vectors"] = vectors
    return replace(data, summary=data.summary | {"backbone": backbone})


def _embed(config: Config, data: EncodedDataset, weights: str, url: str) -> None:
    """Write the vectors of all splits, float32 [N, D] each, to the folder `url`."""
    known = config.net.checkpoint
    assert known is not None
    encoder = PretrainedText(known["architecture"], config.net.pooling or known["pooling"], "all")
    path = commit.fetch(weights, last=commit.DIGESTS) / WEIGHTS
    encoder.backbone.load_state_dict(safetensors.torch.load_file(path))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder.eval().to(device)
    opened = {name: data.open(name)[0][Texts.kind] for name in splits.NAMES}
    total = sum(map(len, opened.values()))
    with commit.atomic_folder(url) as folder, WorkBar("embedding", total, "texts") as bar:
        for name, tokens in opened.items():
            np.save(folder / f"{name}.npy", _vectors(encoder, tokens, device, bar))


@torch.inference_mode()
def _vectors(
    encoder: PretrainedText, tokens: np.ndarray | Ragged, device: torch.device, bar: WorkBar
) -> np.ndarray:
    found_ND = np.empty((len(tokens), encoder.width), np.float32)
    order_N = by_length({Texts.kind: tokens})
    assert order_N is not None
    for rows in batch_slices(len(tokens), BATCH):
        ids_B = order_N[rows]
        found_ND[ids_B] = encoder.embed(torch.from_numpy(tokens[ids_B]).to(device)).cpu().numpy()
        bar.advance(len(ids_B))
    return found_ND
