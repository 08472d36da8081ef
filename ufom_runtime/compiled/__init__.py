"""Compiled steps: what a step keeps for its backward step, and how its convolutions are rewritten."""
