"""The bundle: a model directory that describes itself, what runs it, and where it is registered.

Imports no torch: serving needs none.
"""

from train.bundle.bundle import Bundle, BundleWriter, CorruptBundle
from train.bundle.manifest import Manifest, Variant
from train.bundle.predictor import Predictor

__all__ = ["Bundle", "BundleWriter", "CorruptBundle", "Manifest", "Predictor", "Variant"]
