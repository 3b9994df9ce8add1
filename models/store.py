"""The name under which versions that 0.1.0 registered load their weights, where this package is
imported already; our own code has it from `models.networks.saved_model`."""

from models.networks.saved_model import load

__all__ = ["load"]
