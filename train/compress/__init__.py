"""Compression: smaller and faster variants of a net, and the gate that accepts or refuses them."""

from train.compress.compress import Compressed, compress

__all__ = ["Compressed", "compress"]
