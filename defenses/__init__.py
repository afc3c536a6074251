"""The defenses: one file each, found by name."""
