"""The pipeline turns a request into images with their metadata."""
