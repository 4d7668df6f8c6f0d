"""Data: what is read, in which order, and what is kept of it on the disk."""
