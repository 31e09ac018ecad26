"""Compression: smaller and faster variants of a net, and the gate that accepts or refuses them."""

from train.compress.pipeline import CompressionResult, compress

__all__ = ["CompressionResult", "compress"]
