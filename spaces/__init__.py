"""What can be searched: knobs, settings and the named spaces."""
