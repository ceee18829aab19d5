"""Train image classifiers on the samples that still teach the model something, and never lose work."""

__version__ = "0.1.0"
