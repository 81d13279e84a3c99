"""Llama and its kin."""
