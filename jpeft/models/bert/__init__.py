"""BERT, RoBERTa and MiniLM."""
