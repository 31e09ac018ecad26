"""Nets: small torch modules. They take a task's arrays as encoded; normalisation is inside."""

from collections.abc import Mapping

from torch import Tensor, nn

from train.config import Net
from train.nets.convnet import ConvNet
from train.nets.multimodal import MultimodalNet, image_net
from train.tasks import Images, Task
from train.tasks.plugins import import_object

__all__ = ["ConvNet", "create_net", "folded_net", "resize_net"]


def create_net(config: Net, task: Task, smallest_side: float = 1.0) -> nn.Module:
    """Return a task's net with initial weights: one for images alone, else a combined one.

    A net of the user's own is a class of (task), whose instances take the task's arrays in their
    order and return outputs [B, K]; it may have `fit_inputs` and `folded`, and its last layer,
    where it has a learning rate of its own, is called `head`.

    smallest_side: share of height and width of the smallest images in training.
    Raises ValueError if the data do not fit the net.
    """
    if config.class_path is not None:
        custom = import_object(config.class_path)(task)
        if not isinstance(custom, nn.Module):
            raise ValueError(f"net is '{config.class_path}', which makes no torch.nn.Module")
        return custom
    match task.features.encoders:
        case [Images() as images]:
            return image_net(config, images, task.target.num_outputs, smallest_side)
        case _:
            return MultimodalNet(config, task, smallest_side)


def folded_net(net: nn.Module) -> nn.Module:
    """Return the net in its inference form."""
    return net.folded() if hasattr(net, "folded") else net.eval()  # type: ignore[operator]


def resize_net(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give `net` weights and, where channels have been removed from them, their shapes.

    Raises RuntimeError if they are not of such a net.
    """
    for name, value in weights.items():
        path, _, key = name.rpartition(".")
        layer = net.get_submodule(path)
        before = getattr(layer, key, None)
        if before is None or before.shape == value.shape:
            continue
        if isinstance(before, nn.Parameter):
            setattr(layer, key, nn.Parameter(value.clone(), before.requires_grad))
        else:
            setattr(layer, key, value.clone())
        match layer:
            case nn.Conv2d():
                layer.out_channels, layer.in_channels = layer.weight.shape[:2]
            case nn.Linear():
                layer.out_features, layer.in_features = layer.weight.shape
            case nn.LayerNorm():
                layer.normalized_shape = tuple(value.shape)
            case nn.BatchNorm2d() | nn.BatchNorm1d():
                layer.num_features = len(value)
    net.load_state_dict(dict(weights))
