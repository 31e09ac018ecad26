"""Bundles: self-describing model directories, the engines that run them, and the model registry.

It does not import torch, because serving does not need it.
"""

from train.bundle.bundle import Bundle, BundleWriter, CorruptBundle
from train.bundle.manifest import Manifest, Variant
from train.bundle.predictor import Predictor
from train.bundle.registry import load_model

__all__ = [
    "Bundle",
    "BundleWriter",
    "CorruptBundle",
    "Manifest",
    "Predictor",
    "Variant",
    "load_model",
]
