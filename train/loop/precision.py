"""Number formats of a training step."""

import torch

from cluster.errors import UserError


def set_backend_flags(device: torch.device) -> None:
    """Let a GPU use TF32 for fp32 products, and let cuDNN choose convolutions by benchmark."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products and convolutions.

    precision: fp32, bf16, fp16, or auto, which is bf16 if the device supports it natively, else
    fp32. Raises UserError for bf16 on a GPU that does not support it.
    """
    if precision == "fp16":
        return torch.float16
    native = _has_bf16(device)
    if precision == "bf16" and device.type == "cuda" and not native:
        raise UserError(
            f"precision is bf16, which {torch.cuda.get_device_name(device)} lacks; use fp16."
        )
    use_bf16 = precision == "bf16" or (precision == "auto" and native)
    return torch.bfloat16 if use_bf16 else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Return the context in which a forward pass runs."""
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype)


def gradient_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """Return the gradient scaler that fp16 needs; it is disabled for other dtypes."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
