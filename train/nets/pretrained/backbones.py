"""Networks of transformers and timm: built without weights, and the weights of a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from cluster.errors import UserError, error_line
from train.nets.pretrained.checkpoints import CONFIG, SHARDS, TIMM, PretrainedCheckpoint
from train.nets.pretrained.torchvision_operators import declare_operators

# The output of this part is not used; its weights are missing in most checkpoints.
POOLER = "pooler"


def build_backbone(architecture: Mapping[str, Any]) -> nn.Module:
    """Return a network with random weights. architecture: see PretrainedCheckpoint.architecture.

    Raises ValueError if its library is not installed or cannot build it.
    """
    declare_operators()
    build, library, extra = (
        (_of_timm, "timm", "vision")
        if TIMM in architecture
        else (_of_transformers, "transformers", "text")
    )
    name = architecture.get(TIMM) or architecture.get("model_type")
    try:
        return build(dict(architecture)).float()
    except ImportError as error:
        raise ValueError(
            f"net.pretrained has the model type '{name}', which needs {library}; install it with: "
            f"pip install 'halyard[{extra}]'"
        ) from error
    except Exception as error:  # what the libraries raise differs by architecture
        raise ValueError(
            f"net.pretrained has the model type '{name}', which cannot be built: "
            f"{error_line(error)}"
        ) from error


def _of_timm(options: dict[str, Any]) -> nn.Module:
    import timm

    built: nn.Module = timm.create_model(options.pop(TIMM), **options, num_classes=0)
    return built


def _of_transformers(options: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(options.pop("model_type"), **options)
    backbone: nn.Module = AutoModel.from_config(config)
    # Parameters without a gradient would stop data-parallel training.
    pooler = getattr(backbone, POOLER, None)
    if pooler is not None and any(True for _ in pooler.parameters()):
        setattr(backbone, POOLER, None)
    return backbone


def read_weights(checkpoint: PretrainedCheckpoint) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, named as in the network that `build_backbone` returns.

    Raises UserError if weights are missing, or if their shapes differ from the architecture.
    """
    declare_operators()
    read = _read_timm if TIMM in checkpoint.architecture else _read_transformers
    try:
        weights, missing, differing = read(checkpoint)
    except Exception as error:  # what the libraries raise differs by architecture
        raise UserError(
            f"net.pretrained is '{checkpoint.name}', whose weights cannot be read: "
            f"{error_line(error)}."
        ) from error
    if wrong := missing or differing:
        what = "lack" if missing else "have another shape for"
        raise UserError(
            f"net.pretrained is '{checkpoint.name}', whose weights {what} '{wrong[0]}'"
            + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
            + "; they are of another architecture than its config.json."
        )
    return weights


def _read_timm(checkpoint: PretrainedCheckpoint) -> tuple[dict[str, Tensor], list[str], list[str]]:
    found: dict[str, Tensor] = {}
    for path in checkpoint.weights:
        found |= safetensors.torch.load_file(path)
    wanted = build_backbone(checkpoint.architecture).state_dict()
    missing = sorted(wanted.keys() - found.keys())
    differing = sorted(
        name for name in wanted.keys() & found.keys() if wanted[name].shape != found[name].shape
    )
    weights = {name: found[name].to(value.dtype) for name, value in wanted.items() if name in found}
    return weights, missing, differing


def _read_transformers(
    checkpoint: PretrainedCheckpoint,
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with TemporaryDirectory(prefix="checkpoint-") as folder:
        # Other files, such as the configuration of adapters, would be read, too.
        for path in (checkpoint.folder / CONFIG, checkpoint.folder / SHARDS, *checkpoint.weights):
            if path.exists():
                Path(folder, path.name).symlink_to(path.resolve())
        model, report = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=torch.float32,
        )
    unused = f"{POOLER}."
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(unused))
    differing = sorted(str(each[0]) for each in report["mismatched_keys"])
    state = model.state_dict()
    weights = {name: value for name, value in state.items() if not name.startswith(unused)}
    return weights, missing, differing
