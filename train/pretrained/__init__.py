"""Pretrained encoders of a run: their files, the vectors of frozen ones, and the choice of one."""
