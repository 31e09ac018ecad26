"""The model card: what a bundle is, in one page that needs nothing else."""

from train.card.page import card, write

__all__ = ["card", "write"]
