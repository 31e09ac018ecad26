"""Rollouts: a candidate version is compared with production, then promoted or rolled back."""
