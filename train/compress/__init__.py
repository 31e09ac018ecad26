"""Compression: smaller and faster variants of a net, and the gate that accepts or refuses them."""

from train.compress.compress import fastest, make_variants

__all__ = ["fastest", "make_variants"]
