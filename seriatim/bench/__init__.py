"""Timing: where time goes, and the official codes as opponents on the same weights and the same draws."""
