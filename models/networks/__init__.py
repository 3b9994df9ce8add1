"""Backbones, encodings, losses and baselines, and how methods are put together. Arrays in, scores out."""
