"""Weight files, tokenizers and where they come from."""
