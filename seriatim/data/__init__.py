"""Data sources, the order in which training reads them, and caches of them on the disk."""
