"""Tiny checkpoints with random weights, as transformers and timm save them."""

import json
from pathlib import Path

import safetensors.torch
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from train.nets.pretrained.torchvision_operators import declare_operators

declare_operators()

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz", "good", "bad", "film"]
POSITIONS = 40
SMALL = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "bert": SMALL,
    "roberta": {**SMALL, "max_position_embeddings": POSITIONS + 1, "type_vocab_size": 1},
    "distilbert": {
        "vocab_size": len(WORDS),
        "dim": 16,
        "hidden_dim": 32,
        "n_layers": 3,
        "n_heads": 2,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 0,
    },
    "mpnet": {**SMALL, "max_position_embeddings": POSITIONS + 1},
    "modernbert": {**SMALL, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1},
}


SIDE = 32
IMAGE_ARCHITECTURES = {
    "vit": {
        **{key: SMALL[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")},
        "num_hidden_layers": 3,
        "image_size": SIDE,
        "patch_size": 8,
    },
    "convnext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1], "num_stages": 4},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
}
# Small models that timm has for tests.
TIMM_ARCHITECTURES = ("test_vit", "test_convnext", "test_resnet", "test_efficientnet")
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def save_image_checkpoint(folder: Path, kind: str = "vit") -> Path:
    """Write a checkpoint of a model type of transformers, or of a model of timm."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    if kind in IMAGE_ARCHITECTURES:
        from transformers import AutoConfig, AutoModel

        model = AutoModel.from_config(AutoConfig.for_model(kind, **IMAGE_ARCHITECTURES[kind]))
        _spread(model)
        _fit_batch_norms(model, SIDE)
        model.save_pretrained(folder)
        size = {"height": SIDE, "width": SIDE}
        facts = {"size": size, "image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255}
        (folder / "preprocessor_config.json").write_text(json.dumps(facts))
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
        return folder
    import timm

    model = timm.create_model(kind, num_classes=7)
    _spread(model)
    _fit_batch_norms(model, model.pretrained_cfg["input_size"][1])
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    facts = {"input_size": [3, SIDE, SIDE], "mean": MEAN, "std": STD, "license": "mit"}
    if "vit" in kind:
        facts["input_size"] = list(model.pretrained_cfg["input_size"])
    config = {"architecture": kind, "num_classes": 7, "pretrained_cfg": facts}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _spread(model: torch.nn.Module) -> None:
    """Set weights far enough from 0 that inputs differ."""
    for param in model.parameters():
        if param.ndim >= 2:
            torch.nn.init.normal_(param, std=0.3)


@torch.no_grad()
def _fit_batch_norms(model: torch.nn.Module, side: int) -> None:
    """Set the statistics of batch norms to those of random images."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(torch.randn(4, 3, side, side))


def save_checkpoint(folder: Path, kind: str = "bert", licence: str | None = "mit") -> Path:
    """Write a checkpoint of a model type with random weights, and return its folder."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **ARCHITECTURES[kind]))
    _spread(model)
    model.save_pretrained(folder)
    numbers = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(WORDS[:4])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    if licence:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n# Tiny\n")
    return folder
