"""The model card: a self-contained HTML page that describes a bundle."""

from train.reports.model_card import render_card, write_card

__all__ = ["render_card", "write_card"]
