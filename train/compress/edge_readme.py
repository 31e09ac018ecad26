"""The README of an edge export, with Python code that runs the file for one record."""

import json
from typing import Any

from tokenizers import Tokenizer

from train.bundle import Bundle
from train.tasks import Categories, Images, Numbers, Texts
from train.tasks.columns.image import LEAST_HEIGHT, MOST_HEIGHTS
from train.tasks.columns.lists import LabelSet, Vector
from train.tasks.columns.text import BETWEEN
from train.values.ragged import FREE

MODEL, TOKENIZER = "model.onnx", "tokenizer.json"


def edge_readme(bundle: Bundle, variant: str, outputs: list[str]) -> str:
    """Return the README of an edge file: its prediction target, metric and example code.

    outputs: names of the file's outputs, in order.
    """
    manifest, task = bundle.manifest, bundle.task
    script = _Script()
    for encoder in task.features.encoders:
        script.add(encoder)
    metric = f"test_{task.metric}"
    classes = getattr(task.target, "classes", ())
    known = f"Classes, in the order of `probabilities`: {', '.join(classes)}" if classes else ""
    padding = ""
    if any(spec.ragged for spec in task.features.inputs):
        padding = (
            " The second dimension of lists, such as tokens, is the length of the longest record; "
            "fill the others with 0 behind their values."
        )
    return f"""# {manifest.name}, {variant}

`{MODEL}` predicts `{task.target.column}`. It needs only onnxruntime.
{metric}: {manifest.variants[variant].metrics[metric]:.4f}

The first dimension of every input is the number of records.{padding}

```python
{script.text(outputs)}
```

onnxruntime 1.32 sends usage data to its vendor unless `ORT_DISABLE_TELEMETRY=1` is set.

{known}
"""


class _Script:
    """Collects the lines of the example code, which predicts one record."""

    def __init__(self) -> None:
        self._imports = ["import numpy as np", "import onnxruntime"]
        self._before: list[str] = []
        self._inputs: list[str] = []

    def add(self, encoder: Any) -> None:
        match encoder:
            case Images():
                height, width, channels = encoder.shape_HWC
                mode = "L" if channels == 1 else "RGB"
                brought = "ImageOps.fit" if encoder.crop else "Image.Image.resize"
                pixels = f"np.asarray(image).reshape(1, {height}, {width}, {channels})"
                self._imports.append("from PIL import Image, ImageOps")
                self._before += [
                    'image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGBA")',
                    'white = Image.new("RGBA", image.size, "white")',
                    f'image = Image.alpha_composite(white, image).convert("{mode}")',
                ]
                if encoder.has_free_height:
                    self._before += [
                        f"height = round(image.height * {width} / image.width)",
                        f"height = min(max(height, {LEAST_HEIGHT}), {MOST_HEIGHTS * width})",
                    ]
                    # 0 is the padding of images that differ in height.
                    pixels = f"np.maximum(np.asarray(image).reshape(1, -1, {width}, {channels}), 1)"
                shown = "height" if encoder.has_free_height else height
                self._before += [
                    f"image = {brought}(image, ({width}, {shown}), Image.Resampling.BILINEAR)",
                    f"pixels = {pixels}",
                ]
                self._inputs.append(f'"{encoder.column}": pixels,')
            case Numbers():
                notes = {"date": "seconds since 1970, UTC", "boolean": "1 or 0", "number": "number"}
                for each in encoder.columns:
                    if isinstance(each, Vector | LabelSet):
                        count = len(each.places)
                        note = f"  # {count} numbers, or nan"
                        if isinstance(each, LabelSet):
                            note = f"  # 1 for each label that is present: {', '.join(each.labels)}"
                        self._inputs.append(f'"{each.column}": np.zeros((1, {count})),{note}')
                        continue
                    note = f"  # {notes[each.kind]}, or nan"
                    self._inputs.append(f'"{each.column}": np.array([np.nan]),{note}')
            case Categories():
                for column, names in zip(encoder.columns, encoder.names_C, strict=True):
                    name = json.dumps(names[0] if names else "")
                    self._inputs.append(f'"{column}": np.array([{name}], object),')
            case Texts():
                self._add_texts(encoder)
            case _:
                for spec in encoder.inputs:
                    shape = (1, *(1 if size == FREE else size for size in spec.shape))
                    self._inputs.append(f'"{spec.name}": np.zeros({shape}, "{spec.dtype}"),')

    def _add_texts(self, encoder: Texts) -> None:
        """Add lines that encode texts like Texts.encode: joined by a separator."""
        mark = Tokenizer.from_str(encoder.tokenizer).token_to_id(BETWEEN)
        between = "" if mark is None else f"[{mark}] * (number > 0) + "
        most = encoder.max_tokens
        self._imports.append("from tokenizers import Tokenizer")
        self._before += [
            f'tokenizer, ids = Tokenizer.from_file("{TOKENIZER}"), []',
            f"texts = {['a text'] * len(encoder.columns)}  # {', '.join(encoder.columns)}",
            "for number, text in enumerate(texts):",
            f"    ids += {between}tokenizer.encode(text).ids",
            f"ids = [number + 1 for number in ids[:{most}]] or [0]  # no text is a 0",
        ]
        self._inputs.append(f'"{encoder.kind}": np.array([ids], np.int32),')

    def text(self, outputs: list[str]) -> str:
        names = ", ".join(outputs)
        return "\n".join(
            [
                *dict.fromkeys(self._imports),
                "",
                *self._before,
                "inputs = {",
                *(f"    {line}" for line in self._inputs),
                "}",
                f'session = onnxruntime.InferenceSession("{MODEL}")',
                f"[{names}] = session.run({outputs}, inputs)",
                f"print({names})",
            ]
        )
