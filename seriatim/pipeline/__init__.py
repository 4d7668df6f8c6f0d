"""The pipeline: from a request to images with their metadata."""
