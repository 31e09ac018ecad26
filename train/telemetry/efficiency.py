"""The resources that a run uses: floating-point operations, memory, energy.

Shapes: B samples of a batch.
"""

import resource

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Dense 16-bit peak of a device in FLOP/s, from the maker's data sheet, by a part of its name.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "T4": 65e12,
    "V100": 125e12,
}


@torch.no_grad()
def training_flops(net: nn.Module, sample: list[Tensor]) -> float:
    """Return the FLOPs of one sample's forward and backward pass.

    They are estimated as three times the FLOPs of the forward pass. sample: inputs, [B, …] each.
    """
    training = net.training
    net.eval()
    with FlopCounterMode(display=False) as counter:
        net(*sample)
    net.train(training)
    return 3.0 * counter.get_total_flops() / len(sample[0])


def utilisation(flops_per_s: float, device: torch.device) -> float | None:
    """Return the share of the device's peak FLOPs (MFU), or None if the peak is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = [peak for part, peak in PEAK_FLOPS.items() if part in name]
    return flops_per_s / peaks[0] if peaks else None


def peak_memory_bytes(device: torch.device) -> int:
    """Return this worker's peak memory in bytes: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def joules(device: torch.device) -> float | None:
    """Return the GPU's energy use since its driver was loaded, in joules; None if not known."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except (ImportError, OSError, RuntimeError):
        return None
