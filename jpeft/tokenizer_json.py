"""tokenizer.json, as the package `tokenizers` writes it, and tokenizer_config.json beside it."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jpeft import jsonfiles, textfiles
from jpeft.lazy import extra

LARGEST_ID = 2**31 - 1  # that JAX's tokens, int32, can be

_PART = {'type': str}
# What is looked at where the package refuses a file, to say which place is wrong, and by whom reads
# a file without the package.
SCHEMA = {
  'model': {
    'type?': str,
    'vocab?': ({str: int}, [[(str, float)]]),
    'merges?': [(str, [str])],
    'unk_token?': (str, None),
    'unk_id?': (int, None),
    'dropout?': (float, None),
  },
  'added_tokens?': ([{'id': int, 'content': str, 'special?': bool}], None),
  'normalizer?': (_PART, None),
  'pre_tokenizer?': (_PART, None),
  'post_processor?': (_PART, None),
  'decoder?': (_PART, None),
  'padding?': ({'pad_token': str, 'pad_id': int}, None),
  'truncation?': ({'max_length': int}, None),
}
# Of tokenizer_config.json.
CONFIG = {'chat_template?': (str, [{'name': str, 'template': str}], None)}


def read(file: Path) -> Any:
  """The `tokenizers.Tokenizer` of a tokenizer.json.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is none, or the package does not read it; the message has the place.
    ModuleNotFoundError: the package is not installed; one sentence that names the extra.
  """
  with extra('llm'):
    import tokenizers
  text = textfiles.text_of(file, jsonfiles.LARGEST)
  value = jsonfiles.parsed(text, str(file))
  unread = f'{file} is no tokenizer.json that is read'
  with sentences(unread):
    try:
      encoder = tokenizers.Tokenizer.from_str(text)
    except BaseException:
      jsonfiles.check(value, SCHEMA, unread)  # which may say more than the package does
      raise
    largest = max(encoder.get_vocab().values(), default=0)
    if largest > LARGEST_ID:
      raise ValueError(
        f'{file}: its token {encoder.id_to_token(largest)!r} has the number {largest}, and JAX '
        f'counts tokens up to {LARGEST_ID}'
      )
  return encoder


def content(file: Path) -> dict[str, Any]:
  """The checked value of a tokenizer.json, without the package; raises as `read` does."""
  return jsonfiles.read(file, SCHEMA)


def special_tokens(config: Mapping[str, Any], where: Path) -> dict[str, str]:
  """{'pad_token': '[PAD]', ...} of the value of a tokenizer_config.json.

  Raises:
    ValueError: one is an object without its text.
  """
  found = {}
  for name, token in config.items():
    if name.endswith('_token') and isinstance(token, (str, Mapping)):
      if not isinstance(token, str):
        jsonfiles.check(token, {'content': str}, str(where), name)
        token = token['content']
      found[name] = token
  return found


@contextlib.contextmanager
def sentences(what: str) -> Iterator[None]:
  """Makes of whatever `tokenizers` raises a ValueError that begins with `what`.

  The package raises bare exceptions, and where its Rust code panics one that is no Exception.
  """
  try:
    yield
  except (ValueError, KeyboardInterrupt, SystemExit, GeneratorExit):
    raise
  except BaseException as error:
    raise ValueError(f'{what} ({error})') from error
