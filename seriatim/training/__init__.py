"""Training: recipes, data, the loop."""
