"""Crashes and failed writes, injected at each system call of a piece of code."""
