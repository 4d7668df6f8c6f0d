"""Evaluation: distances between sets of images, and what they mean."""
