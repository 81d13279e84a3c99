"""Benchmarks that write the tables of docs/."""
