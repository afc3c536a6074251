"""Layers that several defenses build their networks of."""
