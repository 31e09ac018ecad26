"""Text classifiers of transformers: an encoder with a head. Shapes: B batch, L tokens, K classes.

It runs in the isolated process.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from train.compress.recipes.export_onnx import ExportError, to_onnx
from train.importing.isolated import Unsuitable
from train.importing.sample import Sample
from train.nets.pretrained.checkpoints import PretrainedCheckpoint
from train.nets.pretrained.text import has_rotary, transformer_inputs
from train.nets.pretrained.torchvision_operators import declare_operators
from train.tasks import Texts

# Records that the original computes at once, and those that the export is traced with.
BATCH, TRACED = 16, 4
# Names that transformers gives to classes without a name.
UNNAMED = "LABEL_"


class _Classifier(nn.Module):
    """Token numbers, 0 for padding, int32 [B, L] → logits, float32 [B, K]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.padding = int(model.config.pad_token_id or 0)
        self.has_rotary = has_rotary(model)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        given = transformer_inputs(tokens_BL, self.padding, has_rotary=self.has_rotary)
        logits: Tensor = self.model(**given).logits
        return logits


def adapt_text_classifier(
    folder: Path, sample: Sample, target: Path
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a folder that transformers wrote; write its ONNX graph to `target`.

    Returns what is known of it, and its own outputs for the sample, [N, …] by name. Raises
    Unsuitable if the model cannot be imported.
    """
    declare_operators()
    try:
        import transformers
    except ImportError as error:
        raise Unsuitable(
            "it needs transformers; install it with: pip install 'halyard[text]'"
        ) from error
    checkpoint = PretrainedCheckpoint(str(folder), folder)
    options = {"local_files_only": True, "trust_remote_code": False}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, use_safetensors=True, **options
    ).eval()
    if model.config.problem_type == "multi_label_classification":
        raise Unsuitable("it predicts several labels for a text; one is supported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    (column,) = sample.choose(None, 1)
    texts = [text or "" for text in sample.texts[column]]
    most = min(checkpoint.max_tokens or tokenizer.model_max_length, tokenizer.model_max_length)
    logits_NK = _logits(model, tokenizer, texts, most)
    encoder = Texts((column,), max_tokens=most, tokenizer=checkpoint.tokenizer.read_text())
    net = _Classifier(model)
    try:
        to_onnx(net, encoder.inputs, encoder.encode({column: texts[:TRACED]}), target)
    except ExportError as error:
        raise Unsuitable(f"it cannot be exported to ONNX: {error}") from error
    count = logits_NK.shape[1]
    names = [str(model.config.id2label[number]) for number in range(count)]
    facts: dict[str, Any] = {
        "library": f"transformers {transformers.__version__}",
        "model": type(model).__name__,
        "layout": "tokens",
        "columns": [column],
        "categories": [],
        "known": {},
        "limits": {"missing": [], "unknown": []},
        "max_tokens": most,
        "output": "logits",
        "task_type": "classification" if count > 1 else "regression",
        "outputs": "logits" if count > 1 else "values",
        "classes": None if all(name.startswith(UNNAMED) for name in names) else names,
    }
    return facts, {"values": logits_NK}


@torch.inference_mode()
def _logits(model: Any, tokenizer: Any, texts: list[str], most: int) -> np.ndarray:
    """Return the logits of texts, float64 [N, K], as transformers computes them."""
    parts = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            texts[start : start + BATCH],
            padding=True,
            truncation=True,
            max_length=most,
            return_tensors="pt",
        )
        parts.append(model(**batch).logits.double().numpy())
    return np.concatenate(parts)
