"""The layers from which backbones and heads are built."""
