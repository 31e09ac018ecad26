"""The model card: what a bundle is, in one page that needs nothing else."""

from train.reports.model_card import render_card, write_card

__all__ = ["render_card", "write_card"]
