"""Tiny checkpoints of pretrained encoders, with random weights, as transformers saves them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

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


def save_checkpoint(folder: Path, kind: str = "bert", licence: str | None = "mit") -> Path:
    """Write a checkpoint of a model type with random weights, and return its folder."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **ARCHITECTURES[kind]))
    for param in model.parameters():  # far enough from 0 that texts differ
        if param.ndim >= 2:
            torch.nn.init.normal_(param, std=0.3)
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
