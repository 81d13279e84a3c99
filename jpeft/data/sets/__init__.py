"""Data sets that ordinary packages carry."""
