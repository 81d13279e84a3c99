"""Tokenizers with chat templates: from tokenizer.json and its neighbours, or from a GGUF file."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .gguf import Gguf
from .safetensors import read_json

FILES = ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja')

# Types of tokens in GGUF that are found in a text before it is split; control tokens are special,
# that is, left out of decoded text.
_CONTROL = 3
_USER = 4


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
    """The ids of a text; special tokens that are written out in it get their own.

    Args:
      text: any.
      begin: add the token that begins a text, if the model was trained with one. A chat template
        writes its own.
    """
    ids = self.encoder.encode(text, add_special_tokens=False).ids
    if begin and self._begins_with_bos():
      return [self.bos, *ids]
    return ids

  def _begins_with_bos(self) -> bool:
    """Whether the model was trained on texts that begin with `bos`."""
    if self.bos is None:
      return False
    return self.encoder.encode('', add_special_tokens=True).ids[:1] == [self.bos]

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

    bos = ''
    if self.bos is not None:
      bos = self.token(self.bos)
    try:
      return _compiled(self.template).render(
        messages=list(messages),
        add_generation_prompt=reply,
        bos_token=bos,
        eos_token=self.token(self.eos),
      )
    except jinja2.TemplateError as error:
      raise ValueError(f'the chat template refuses the messages: {error}') from error


def load_tokenizer(path: str | Path) -> Tokenizer:
  """The tokenizer of a `Pretrained` (its `tokenizer`), of a folder, or of a GGUF file.

  Args:
    path: tokenizer.json, a folder with that file, or a .gguf file. The special tokens are those of
      tokenizer_config.json beside it; the chat template is there or in chat_template.jinja.

  Raises:
    ValueError: there are no special tokens, or a kind of tokenizer that is not supported.
  """
  path = Path(path)
  if path.suffix == '.gguf':
    return from_gguf(Gguf(path))
  if path.is_dir():
    path = path / 'tokenizer.json'
  import tokenizers  # here, since backbones of images do without it

  encoder = tokenizers.Tokenizer.from_str(path.read_text())
  # Batches are padded and cut by the caller.
  encoder.no_padding()
  encoder.no_truncation()
  file = path.with_name('tokenizer_config.json')
  config = {}
  if file.exists():
    config = read_json(file)
  template = config.get('chat_template')
  jinja = path.with_name('chat_template.jinja')
  if not template:
    template = jinja.read_text() if jinja.exists() else None
  ids = {name: _special_id(encoder, config.get(f'{name}_token')) for name in ('eos', 'bos', 'pad')}
  return _tokenizer(encoder, ids, template, file)


def _special_id(encoder, token: str | Mapping[str, Any] | None) -> int | None:
  """The id of a special token as tokenizer_config.json writes it: its text, or an object of it."""
  if isinstance(token, Mapping):
    token = token['content']
  if not token:
    return None
  return encoder.token_to_id(token)


def from_gguf(file: Gguf) -> Tokenizer:
  """The tokenizer in the metadata of a GGUF file.

  Raises:
    ValueError: there are no special tokens, or a kind of tokenizer that is not supported.
  """
  import tokenizers
  from tokenizers import AddedToken, decoders, models, processors

  values = {key.removeprefix('tokenizer.ggml.'): value for key, value in file.metadata.items()}
  splits = _splits()
  if values.get('model') != 'gpt2' or values.get('pre', 'default') not in splits:
    raise ValueError(
      f'{file.folder}: the tokenizer {values.get("model")!r} with the splitting '
      f"{values.get('pre')!r} is not supported, only 'gpt2' with {', '.join(splits)}"
    )
  tokens = values['tokens']
  vocabulary = {token: i for i, token in enumerate(tokens)}
  merges = [tuple(merge.split(' ')) for merge in values['merges']]
  encoder = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
  encoder.pre_tokenizer = splits[values.get('pre', 'default')]
  encoder.decoder = decoders.ByteLevel()

  def added(kind: int) -> list[AddedToken]:
    kinds = zip(tokens, values['token_type'], strict=True)
    return [AddedToken(token, normalized=False) for token, other in kinds if other == kind]

  encoder.add_special_tokens(added(_CONTROL))
  encoder.add_tokens(added(_USER))
  ids = {
    'eos': values.get('eos_token_id'),
    'bos': values.get('bos_token_id'),
    'pad': values.get('padding_token_id'),
  }
  # In the encoder, so that a tokenizer.json that is saved from it has this too.
  if values.get('add_bos_token') and ids['bos'] is not None:
    bos = tokens[ids['bos']]
    encoder.post_processor = processors.TemplateProcessing(
      f'{bos} $A', special_tokens=[(bos, ids['bos'])]
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
  """A tokenizer of the ids of 'eos', 'bos' and 'pad', which are those of the file `where`."""
  if ids['eos'] is None:
    raise ValueError(f'{where} names no end-of-text token (eos), so no text would ever end')
  pad = ids['pad']
  if pad is None:
    pad = ids['eos']
  return Tokenizer(encoder, ids['eos'], ids['bos'], pad, template)


@functools.cache
def _splits() -> dict[str, Any]:
  """{name in GGUF: how a text is split before byte pairs are merged}."""
  from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

  plain = ByteLevel(add_prefix_space=False)
  return {
    'default': plain,
    'gpt-2': plain,
    'smollm': Sequence([Digits(individual_digits=True), plain]),
  }


@functools.lru_cache(maxsize=16)
def _compiled(template: str):
  """A chat template, ready to render. Templates come with checkpoints: they run in a sandbox."""
  from jinja2 import TemplateError
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  def refuse(message):
    raise TemplateError(message)

  environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
  environment.globals['raise_exception'] = refuse
  return environment.from_string(template)
