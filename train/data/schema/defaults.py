"""Training options that suit the kinds of the columns and the number of records."""

from typing import Any

from train.config import LAST, Net
from train.tasks import Images

# Sources with fewer records use cross-validation and longer training.
SMALL = 2_000
LOSS = "valid_loss"
# Number of folds in cross-validation of small sources.
FOLDS = 5


def suited_defaults(
    kinds: set[str],
    num_looked_at: int,
    *,
    is_large: bool = False,
    train_on_valid: bool = False,
    net: Net | None = None,
) -> dict[str, Any]:
    """Return training options for columns of these kinds; {} for images, as the defaults fit them.

    The epoch is chosen by validation loss, or by the loss over folds if records are few, and
    training stops early when that loss no longer falls. num_looked_at: number of records in the
    sample that was inferred from. is_large: whether the source is too large for many epochs. net:
    the given options of the network.
    """
    pretrained = net is not None and net.pretrained is not None
    if any(":" in kind for kind in kinds) or (Images.kind in kinds and not pretrained):
        return {}
    small = num_looked_at < SMALL
    optim: dict[str, Any] = {"name": "adamw", "label_smoothing": 0.0, "batch_size": 64}
    suited_net: dict[str, Any] = {}
    folds = FOLDS if small else 0
    if net is not None and net.pretrained is not None:
        frozen = net.lora is None and (
            net.freeze == "all" if "freeze" in net.model_fields_set else small
        )
        suited_net = {"freeze": "all" if frozen else "none"}
        patience = 16 if frozen else 3
        if not frozen:
            folds = 0  # each fold would take as long as the run
            optim |= {"lr": 0.001, "weight_decay": 0.01, "batch_size": 32, "warmup_fraction": 0.1}
            optim |= {"epochs": 10 if small else 3}
            if net.lora is not None:
                optim |= {"backbone_lr": 0.001, "layer_decay": 1.0}
        else:
            optim |= {"epochs": 200 if small else 40, "schedule": "constant"}
            if len(kinds) == 1:  # a linear layer; with few records gradient descent suits it best
                optim |= {"name": "sgd", "momentum": 0.9, "lr": 0.002}
                optim |= {"weight_decay": 0.2 if small else 0.02}
            else:
                optim |= {"lr": 0.001, "weight_decay": 0.1}
    elif "text" in kinds:
        optim |= {"lr": 0.005, "epochs": 40 if small else 6}
        patience = 16 if small else 3
    else:
        optim |= {"lr": 0.002, "weight_decay": 0.1, "schedule": "constant", "epochs": 200}
        suited_net = {"members": 8, "dropout": 0.2}
        if not small:
            optim |= {"batch_size": 256, "epochs": 100}
        patience = 16
        if is_large:  # one epoch has as many steps as several epochs of a small table
            optim |= {"batch_size": 1024, "epochs": 50}
            patience = 4
    chosen: dict[str, Any] = {"stop": {"metric": LOSS, "patience": patience, "folds": folds}}
    if train_on_valid:  # no held-out records are left to choose the epoch by
        optim |= {"epochs": min(optim["epochs"], 20), "schedule": "linear"}
        chosen = {"checkpoint": {"metric": LAST}}
    # bf16 would round the input numbers.
    return {"optim": optim, "net": suited_net, "precision": "fp32", **chosen}
