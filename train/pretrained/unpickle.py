"""Rewrite pickled weights as safetensors, as a script in a process of its own.

    python -I train/pretrained/unpickle.py OUT.safetensors FILE...

PyTorch's restricted unpickler reads tensors and containers only. Nothing else of this project is
imported, so that a file that gets past it finds no more than this process.
"""

import json
import sys

import safetensors.torch
import torch

# Key of the metadata with the names in the order of the pickle.
ORDER = "order"
# Keys under which training programs store the weights beside other values.
NESTED = ("state_dict", "model", "model_state_dict", "module")


def main(target: str, sources: list[str]) -> None:
    """Write the tensors of all files to one file. Raises ValueError if there are none."""
    weights: dict[str, torch.Tensor] = {}
    for source in sources:
        found = torch.load(source, map_location="cpu", weights_only=True)
        for key in NESTED:
            if isinstance(found.get(key), dict):
                found = found[key]
        # Shared tensors are stored once each.
        weights |= {
            str(name).removeprefix("module."): value.detach().clone().contiguous()
            for name, value in found.items()
            if isinstance(value, torch.Tensor)
        }
    if not weights:
        raise ValueError("the file has no tensors")
    # The file itself is sorted.
    safetensors.torch.save_file(weights, target, {ORDER: json.dumps(list(weights))})


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except Exception as error:  # a damaged pickle may raise any class
        lines = str(error).splitlines() or [type(error).__name__]
        sys.exit(next((line for line in lines if "nsupported" in line), lines[0]).strip())
