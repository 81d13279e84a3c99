"""Tokenizers with chat templates: from tokenizer.json and its neighbours, or from the metadata of a
GGUF file.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .gguf import Gguf
from .safetensors import read_json

FILES = ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja')
_CONTROL, _USER = 3, 4  # token types of GGUF that are matched before anything else


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Text to tokens and back.

  Attributes:
    encoder: a `tokenizers.Tokenizer`.
    eos: id of the token that ends a text.
    bos: id of the token that begins one; None for none.
    pad: id of the padding.
    template: the chat template, a Jinja text; None for none.
  """

  encoder: Any
  eos: int
  bos: int | None
  pad: int
  template: str | None

  def encode(self, text: str, begin: bool = False) -> list[int]:
    """The ids of a text, special tokens that are written out among them.

    Args:
      text: any.
      begin: put the token before it that begins a text, if the model is used to one. A chat
        template writes its own.
    """
    ids = self.encoder.encode(text, add_special_tokens=False).ids
    used = (
      begin
      and self.bos is not None
      and self.encoder.encode('', add_special_tokens=True).ids[:1] == [self.bos]
    )
    return [self.bos, *ids] if used else ids

  def token(self, number: int) -> str:
    """How a token is written."""
    return self.encoder.id_to_token(number)

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids, without special tokens."""
    return self.encoder.decode([int(i) for i in ids], skip_special_tokens=True)

  def chat(self, messages: Sequence[Mapping[str, str]], reply: bool = True) -> str:
    """A conversation as the model was trained on it.

    Args:
      messages: such as [{'role': 'user', 'content': 'Hello'}].
      reply: end with the opening of the model's answer.

    Raises:
      ValueError: there is no template, or it refuses the messages.
    """
    if self.template is None:
      raise ValueError('this tokenizer has no chat template: write the prompt yourself')
    import jinja2

    name = lambda i: '' if i is None else self.token(i)
    try:
      return _compiled(self.template).render(
        messages=list(messages),
        add_generation_prompt=reply,
        bos_token=name(self.bos),
        eos_token=name(self.eos),
      )
    except jinja2.TemplateError as error:
      raise ValueError(f'the chat template refuses the messages: {error}') from error


def load_tokenizer(path: str | Path) -> Tokenizer:
  """The tokenizer of a `Pretrained` (its `tokenizer`), of a folder, or of a GGUF file.

  Args:
    path: tokenizer.json, a folder that holds it, or a .gguf file. Beside tokenizer.json,
      tokenizer_config.json names the special tokens and may hold the chat template, else
      chat_template.jinja does.

  Raises:
    ValueError: there are no special tokens, or a kind of tokenizer that is not supported.
  """
  path = Path(path)
  if path.suffix == '.gguf':
    return from_gguf(Gguf(path))
  path = path / 'tokenizer.json' if path.is_dir() else path
  import tokenizers

  encoder = tokenizers.Tokenizer.from_str(path.read_text())
  encoder.no_padding()
  encoder.no_truncation()
  file = path.with_name('tokenizer_config.json')
  told = read_json(file) if file.exists() else {}
  jinja = path.with_name('chat_template.jinja')
  template = told.get('chat_template') or (jinja.read_text() if jinja.exists() else None)
  token = lambda name: told[name]['content'] if isinstance(told.get(name), dict) else told.get(name)
  ids = {
    name: encoder.token_to_id(token(f'{name}_token')) if token(f'{name}_token') else None
    for name in ('eos', 'bos', 'pad')
  }
  return _tokenizer(encoder, ids, template, file)


def from_gguf(file: Gguf) -> Tokenizer:
  """See `load_tokenizer`."""
  import tokenizers
  from tokenizers import AddedToken, decoders, models, processors

  held = {key.removeprefix('tokenizer.ggml.'): value for key, value in file.metadata.items()}
  if held.get('model') != 'gpt2' or held.get('pre', 'default') not in _splits():
    raise ValueError(
      f'{file.folder}: the tokenizer {held.get("model")!r} with the splitting {held.get("pre")!r} is '
      f"not supported, only 'gpt2' with {', '.join(_splits())}"
    )
  tokens = held['tokens']
  encoder = tokenizers.Tokenizer(
    models.BPE(
      {token: i for i, token in enumerate(tokens)},
      [tuple(merge.split(' ')) for merge in held['merges']],
    )
  )
  encoder.pre_tokenizer, encoder.decoder = (
    _splits()[held.get('pre', 'default')],
    decoders.ByteLevel(),
  )
  for kind, add in ((_CONTROL, encoder.add_special_tokens), (_USER, encoder.add_tokens)):
    add(
      [
        AddedToken(token, normalized=False)
        for token, of in zip(tokens, held['token_type'], strict=True)
        if of == kind
      ]
    )
  ids = {
    'eos': held.get('eos_token_id'),
    'bos': held.get('bos_token_id'),
    'pad': held.get('padding_token_id'),
  }
  if held.get('add_bos_token') and ids['bos'] is not None:
    begin = tokens[ids['bos']]
    encoder.post_processor = processors.TemplateProcessing(
      f'{begin} $A', special_tokens=[(begin, ids['bos'])]
    )
  return _tokenizer(encoder, ids, file.metadata.get('tokenizer.chat_template'), file.folder)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
  """Writes tokenizer.json and tokenizer_config.json, for `load_tokenizer`."""
  tokenizer.encoder.save(str(folder / 'tokenizer.json'))
  ids = {'eos_token': tokenizer.eos, 'bos_token': tokenizer.bos, 'pad_token': tokenizer.pad}
  config = {name: tokenizer.token(i) for name, i in ids.items() if i is not None}
  if tokenizer.template is not None:
    config['chat_template'] = tokenizer.template
  (folder / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')


def _tokenizer(
  encoder, ids: Mapping[str, int | None], template: str | None, where: Path
) -> Tokenizer:
  if ids['eos'] is None:
    raise ValueError(f'{where} names no end-of-text token (eos), so no text would ever end')
  pad = ids['eos'] if ids['pad'] is None else ids['pad']
  return Tokenizer(encoder, ids['eos'], ids['bos'], pad, template)


@functools.cache
def _splits() -> dict[str, Any]:
  """{name in GGUF: how a text is cut before byte pairs are merged}."""
  from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

  plain = ByteLevel(add_prefix_space=False)
  return {
    'default': plain,
    'gpt-2': plain,
    'smollm': Sequence([Digits(individual_digits=True), plain]),
  }


@functools.lru_cache(maxsize=16)
def _compiled(template: str):
  """Templates come with checkpoints: they run in a sandbox."""
  from jinja2 import TemplateError
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  def refuse(message):
    raise TemplateError(message)

  environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
  environment.globals['raise_exception'] = refuse
  return environment.from_string(template)
