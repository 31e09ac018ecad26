"""Compression: make smaller and faster variants of a model and check their accuracy."""

from train.compress.pipeline import CompressionResult, compress

__all__ = ["CompressionResult", "compress"]
