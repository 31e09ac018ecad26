"""Pretrained encoders: found on disk or on the hub, and used as a part of a network."""
