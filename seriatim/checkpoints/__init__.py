"""Model folders: weights, settings and a manifest that proves both whole."""
