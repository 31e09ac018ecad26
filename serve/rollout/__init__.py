"""Rollouts: shadow and canary versions, compared by feedback, promoted or rolled back."""
