"""Networks: small torch modules whose inputs are a task's encoded arrays.

The networks normalise their inputs themselves.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from train.config import Net
from train.nets.convnet import ConvNet
from train.nets.multimodal import MultimodalNet, image_net
from train.tasks import Images, Task
from train.tasks.plugins import import_object

__all__ = ["ConvNet", "create_net", "folded_net", "resize_net"]


def create_net(config: Net, task: Task, smallest_side: float = 1.0) -> nn.Module:
    """Return a network for a task with initial weights.

    It is a ConvNet if the only input is an image and no pretrained encoder is given, and a
    MultimodalNet otherwise. A custom class,
    `config.class_path`, is constructed with the task. Its `forward` receives the task's arrays in
    their order and returns outputs [B, K]. It may define `fit_inputs` and `folded`; a last layer
    named `head` is trained with the learning rate `optim.head_lr`.

    smallest_side: height and width of the smallest images in training, as a share of full size.
    Raises ValueError if the class creates no torch.nn.Module or the data do not fit the network.
    """
    if config.class_path is not None:
        custom = import_object(config.class_path)(task)
        if not isinstance(custom, nn.Module):
            raise ValueError(
                f"net.class_path is '{config.class_path}', which does not create a torch.nn.Module"
            )
        return custom
    match task.features.encoders:
        case [Images() as images] if config.checkpoint is None:
            return image_net(config, images, task.target.num_outputs, smallest_side)
        case _:
            return MultimodalNet(config, task, smallest_side)


def folded_net(net: nn.Module) -> nn.Module:
    """Return the network in its inference form: its `folded()` if defined, else in eval mode."""
    return net.folded() if hasattr(net, "folded") else net.eval()  # type: ignore[operator]


def resize_net(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load `weights` into `net`; pruned layers are resized to the shapes of their weights.

    Raises RuntimeError if the names of the weights do not match the network.
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
