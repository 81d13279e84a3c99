"""Prompts and prefixes."""
