"""Checkpoints of pretrained encoders: a folder, or a repository of the Hugging Face hub.

Only JSON and safetensors are read, so a checkpoint cannot run code.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.errors import UserError, error_line

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
SHARDS = "model.safetensors.index.json"
# How a folder of Sentence Transformers describes its pooling.
POOLING = "1_Pooling/config.json"
CARD = "README.md"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Fields of a configuration that are not about the architecture.
NOT_ARCHITECTURE = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype")


@dataclass(frozen=True)
class PretrainedCheckpoint:
    """A folder of a text encoder: its architecture, weights and tokenizer.

    name: as the user gave it.
    """

    name: str
    folder: Path

    @cached_property
    def architecture(self) -> dict[str, Any]:
        """The configuration of the encoder, as `transformers` reads it."""
        found = self._json(CONFIG)
        if not isinstance(found.get("model_type"), str):
            raise self._refused(f"'{CONFIG}' names no model_type")
        return {key: value for key, value in found.items() if key not in NOT_ARCHITECTURE}

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
        after = self.architecture.get("pad_token_id", 0) + 1
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
                f"give a checkpoint with {WEIGHTS}"
            )
        raise self._refused(f"it has no {WEIGHTS}")

    @cached_property
    def licence(self) -> str | None:
        """The licence that the model's card names; None if it names none."""
        card = self.folder / CARD
        if not card.is_file():
            return None
        front = re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
        found = front and re.search(r"^license:\s*(\S.*?)\s*$", front[1], re.MULTILINE)
        return found[1].strip("'\"") if found else None

    def check(self) -> None:
        """Raise UserError if a file is missing or cannot be read."""
        _ = self.architecture, self.weights, self.tokenizer

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
AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")


def find_checkpoint(name: str) -> PretrainedCheckpoint:
    """Return the checkpoint at a path, in the cache of the Hugging Face hub, or downloaded from it.

    Raises UserError if there is none, or if its files cannot be used.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        checkpoint = PretrainedCheckpoint(name, folder)
    elif folder.exists() or not REPOSITORY.fullmatch(name) or name.startswith("."):
        raise UserError(
            f"net.pretrained is '{name}', which is not a folder; give a folder with {CONFIG}, "
            f"{TOKENIZER} and {WEIGHTS}, or a name on the Hugging Face hub."
        )
    else:
        checkpoint = PretrainedCheckpoint(name, _of_hub(name))
    checkpoint.check()
    return checkpoint


def _of_hub(name: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError as error:
        raise UserError(
            f"net.pretrained is '{name}', and pretrained encoders need transformers; install it "
            "with: pip install 'halyard[text]'."
        ) from error
    wanted = [CONFIG, TOKENIZER, "model*.safetensors", SHARDS, POOLING, CARD]
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=wanted, local_files_only=True)
        )
    except Exception:  # the library's errors for what is not cached differ by version
        offline = constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE")
    problem = "the hub is not used, because HF_HUB_OFFLINE is set"
    if not offline:
        try:
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
        except Exception as error:  # network, unknown name, missing rights
            problem = f"the hub cannot be read: {error_line(error.__cause__ or error)}"
    raise UserError(
        f"net.pretrained is '{name}', which is neither a folder nor in the cache "
        f"'{constants.HF_HUB_CACHE}', and {problem}."
    )
