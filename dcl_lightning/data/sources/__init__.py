"""Data sets: by name, from arrays, and from continuum."""
