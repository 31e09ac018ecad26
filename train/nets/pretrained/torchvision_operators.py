"""Make torchvision importable beside a torch that its compiled operators were not built for.

transformers and timm import torchvision wherever it is installed, but need none of its operators.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

# The operators whose shapes torchvision registers when it is imported, which needs their schemas.
OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@cache
def declare_operators() -> Any:
    """Declare torchvision's operators if it is installed and its own library cannot be loaded.

    Call it before transformers, peft, timm or torchvision is imported. Returns the declarations,
    which last as long as this cached result; None if none are needed.
    """
    found = find_spec("torchvision")
    if found is None or found.origin is None or _exist():
        return None
    for path in Path(found.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(path)
        except OSError:  # built for another torch
            continue
    if _exist():
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in OPERATORS:
        library.define(name + SCHEMA)
    return library


def _exist() -> bool:
    return hasattr(torch.ops.torchvision, OPERATORS[0])
