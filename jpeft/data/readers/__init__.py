"""Data sets of one's own files."""
