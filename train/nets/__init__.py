"""Nets: small torch modules. They take a task's arrays as encoded; normalisation is inside."""

from train.nets.convnet import ConvNet

__all__ = ["ConvNet"]
