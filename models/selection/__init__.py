"""Comparisons of methods, and the gate that decides about the champion."""
