"""Outer training: the loop, its checkpoints and its processes."""
