"""Checkpoints of pretrained encoders, as transformers, Sentence Transformers and timm write them.

Only JSON and safetensors are read, so a checkpoint cannot run code.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cluster.errors import UserError, error_line

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
SHARDS = "model.safetensors.index.json"
PREPROCESSOR = "preprocessor_config.json"
# How a folder of Sentence Transformers describes its pooling.
POOLING = "1_Pooling/config.json"
CARD = "README.md"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Fields of a configuration that are not about the architecture.
NOT_ARCHITECTURE = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype")
# Key of an architecture that is the name of a model of timm.
TIMM = "timm"
# Arguments of timm that make it read other files.
NOT_MODEL_ARGS = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
}


@dataclass(frozen=True)
class PretrainedCheckpoint:
    """A folder of an encoder: its architecture and weights, and how its inputs are prepared.

    name: as the user gave it.
    """

    name: str
    folder: Path

    @cached_property
    def architecture(self) -> dict[str, Any]:
        """The configuration of the encoder: as transformers reads it, or a model of timm.

        A model of timm is its name, under the key "timm", and the arguments it is created with.
        """
        found = self._json(CONFIG)
        if "model_type" not in found and isinstance(found.get("architecture"), str):
            options = {**(found.get("model_args") or {})}
            options.pop("num_classes", None)
            name = found["architecture"]
            if ":" in name or options.keys() & NOT_MODEL_ARGS:
                raise self._refused(f"'{CONFIG}' refers to files outside its folder")
            return {TIMM: name, **options}
        if not isinstance(found.get("model_type"), str):
            raise self._refused(f"'{CONFIG}' names no model_type")
        return {key: value for key, value in found.items() if key not in NOT_ARCHITECTURE}

    @cached_property
    def kind(self) -> Literal["text", "image"]:
        """The kind of columns that the encoder is for."""
        has_words = (self.folder / TOKENIZER).is_file() or "vocab_size" in self.architecture
        is_image = TIMM in self.architecture or (self.folder / PREPROCESSOR).is_file()
        return (
            "image"
            if is_image or ("num_channels" in self.architecture and not has_words)
            else "text"
        )

    @cached_property
    def image(self) -> dict[str, Any]:
        """How images are prepared, see `image_input`. Raises UserError if no file says it."""
        if TIMM in self.architecture:
            found = self._json(CONFIG)
            file, facts = CONFIG, {**found, **(found.get("pretrained_cfg") or {})}
        elif (self.folder / PREPROCESSOR).is_file():
            file, facts = PREPROCESSOR, self._json(PREPROCESSOR)
        else:
            raise self._refused(
                f"it has no {PREPROCESSOR}, which gives size, mean and standard deviation of images"
            )
        try:
            return image_input(self.architecture, facts)
        except (ValueError, KeyError, TypeError, ArithmeticError) as error:
            raise self._refused(f"'{file}' cannot be used: {error_line(error)}") from error

    @property
    def facts(self) -> dict[str, Any]:
        """What a config records of the checkpoint, as its option net.checkpoint."""
        of_kind = {"image": self.image} if self.kind == "image" else {"pooling": self.pooling}
        return {
            "kind": self.kind,
            "architecture": self.architecture,
            **of_kind,
            "licence": self.licence,
            "sha256": self.digest,
        }

    @cached_property
    def pooling(self) -> str:
        """How the vectors of the tokens become one: "mean", "cls" or "last"."""
        if not (self.folder / POOLING).is_file():
            return "mean"
        modes = self._json(POOLING)
        if modes.get("pooling_mode_cls_token"):
            return "cls"
        return "last" if modes.get("pooling_mode_lasttoken") else "mean"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer, a file of Hugging Face Tokenizers."""
        path = self.folder / TOKENIZER
        if not path.is_file():
            raise self._refused(
                f"it has no {TOKENIZER}; save that of a fast tokenizer of transformers beside the "
                "weights"
            )
        return path

    @cached_property
    def max_tokens(self) -> int | None:
        """Number of tokens that the encoder has positions for; None if it has no limit."""
        most = self.architecture.get("max_position_embeddings")
        if not isinstance(most, int) or most < 1:
            return None
        # The positions of RoBERTa and its relatives begin after that of the padding.
        after = (self.architecture.get("pad_token_id") or 0) + 1
        offset = after if self.architecture["model_type"] in AFTER_PADDING else 0
        return most - offset

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights, over all files in order of their names."""
        digest = hashlib.sha256()
        for path in self.weights:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    @property
    def weights(self) -> list[Path]:
        """The files of the weights. Raises UserError if there are none in safetensors."""
        if (self.folder / WEIGHTS).is_file():
            return [self.folder / WEIGHTS]
        if (self.folder / SHARDS).is_file():
            names = sorted(set(self._json(SHARDS).get("weight_map", {}).values()))
            # The index names files of its own folder only.
            paths = [self.folder / Path(str(name)).name for name in names]
            missing = [path.name for path in paths if not path.is_file()]
            if missing:
                raise self._refused(f"'{SHARDS}' names '{missing[0]}', which is not there")
            if not paths:
                raise self._refused(f"'{SHARDS}' names no files")
            return paths
        pickles = [path.name for kind in PICKLES for path in sorted(self.folder.glob(kind))]
        if pickles:
            raise self._refused(
                f"its weights are a pickle ({pickles[0]}), which can run code when it is read; "
                f"convert it with: python -m train.pretrained {self.folder} --to FOLDER"
            )
        raise self._refused(f"it has no {WEIGHTS}")

    @cached_property
    def licence(self) -> str | None:
        """The licence that the model's card names; None if it names none."""
        if TIMM in self.architecture:
            found = self._json(CONFIG)
            named = {**found, **(found.get("pretrained_cfg") or {})}.get("license")
            if named:
                return str(named)
        card = self.folder / CARD
        if not card.is_file():
            return None
        front = re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
        line = front and re.search(r"^license:[ \t]*([^\s\[-].*?)[ \t]*$", front[1], re.MULTILINE)
        return line[1].strip("'\"") if line else None

    def check(self) -> None:
        """Raise UserError if a file is missing or cannot be read."""
        _ = self.weights, self.image if self.kind == "image" else self.tokenizer

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / name).read_text())
        except (OSError, ValueError) as error:
            raise self._refused(f"'{name}' cannot be read: {error_line(error)}") from error
        if not isinstance(found, Mapping):
            raise self._refused(f"'{name}' is not a JSON object")
        return dict(found)

    def _refused(self, problem: str) -> UserError:
        return UserError(f"net.pretrained is '{self.name}': {problem}.")


# Model types whose first position follows the number of the padding token.
AFTER_PADDING = ("roberta", "roberta-prelayernorm", "xlm-roberta", "camembert", "mpnet")


def image_input(architecture: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return how images are given to an encoder: "size" [height, width], "mean" and "std".

    Mean and standard deviation are per channel, of values in [0, 1]. facts: the configuration of
    timm's pretrained weights, or preprocessor_config.json of transformers. Raises ValueError if
    they lack one of the three.
    """
    if TIMM in architecture:
        size = facts["input_size"][1:]
        return {"size": list(size), "mean": list(facts["mean"]), "std": list(facts["std"])}
    size = facts.get("crop_size" if facts.get("do_center_crop") else "size") or facts.get("size")
    if isinstance(size, Mapping):
        side = size.get("shortest_edge")
        size = [size.get("height", side), size.get("width", side)]
    elif isinstance(size, int):
        size = [size, size]
    if not isinstance(size, list) or not all(isinstance(side, int) for side in size):
        raise ValueError("it gives no size of images")
    mean, std = facts.get("image_mean"), facts.get("image_std")
    if not facts.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    if facts.get("rescale_offset"):
        raise ValueError("rescale_offset is not supported")
    if str(facts.get("image_processor_type")).startswith("EfficientNet") and facts.get(
        "include_top", True
    ):
        std = [value**2 for value in std or []]  # this processor divides by it twice
    if not mean or not std:
        raise ValueError("it gives no mean and standard deviation of images")
    # transformers divides by 255 unless its configuration says otherwise.
    factor = facts.get("rescale_factor", 1 / 255) if facts.get("do_rescale", True) else 1.0
    share = 1 / 255 / factor
    return {
        "size": size,
        "mean": [float(value) * share for value in mean],
        "std": [float(value) * share for value in std],
    }
