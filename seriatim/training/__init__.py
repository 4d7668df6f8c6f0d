"""Training: recipes, the training loop, and what it writes."""
