"""Tokenizers with chat templates: from tokenizer.json and its neighbours, or from a GGUF file.

Templates get what transformers gives them: `messages`, `tools`, `documents`,
`add_generation_prompt`, the special tokens by name, `raise_exception`, `strftime_now`, the
statements `break`, `continue` and `generation`, and a `tojson` that leaves characters as they are.
"""

import dataclasses
import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jpeft import jsonfiles, textfiles, tokenizer_json, writing
from jpeft.lazy import extra
from jpeft.messages import no_row

from .gguf import Gguf
from .gguf_tokenizer import encoder_of
from .safetensors import read_json

# Noncharacters, which Unicode keeps out of texts, around what a template says the model writes.
_OPENS = '\ufdd0'
_CLOSES = '\ufdd1'
FILES = ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja')


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Text to tokens and back.

  Attributes:
    encoder: a `tokenizers.Tokenizer`.
    eos: id of the token that ends a text.
    bos: id of the token that begins one; None for none.
    pad: id of the padding.
    template: the chat template, a Jinja text, or {name: template} where there are several:
      'default' and, for chats with tools, 'tool_use'; None for none.
    vocabulary: rows of the model's table of tokens; None if not known. JAX would read a token
      beyond it as NaN.
    specials: {name: how it is written} of the special tokens that templates may write, such as
      'unk_token'; those of `eos` and `bos` need not be there.
  """

  encoder: Any
  eos: int
  bos: int | None
  pad: int
  template: str | Mapping[str, str] | None
  vocabulary: int | None = None
  specials: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

  def __post_init__(self):
    self._check([self.eos, self.pad], 'its end or padding')

  def encode(self, text: str, begin: bool = False) -> list[int]:
    """The ids of a text; special tokens that are written out in it get their own.

    Args:
      text: any.
      begin: add the token that begins a text, if the model was trained with one. A chat template
        writes its own.

    Raises:
      ValueError: a token that the model has no row for, or no text.
    """
    with tokenizer_json.sentences(f'{text!r:.60} is no text that a tokenizer reads'):
      ids = self.encoder.encode(text, add_special_tokens=False).ids
    self._check(ids, repr(text[:40]))
    if begin and self._begins_with_bos():
      return [self.bos, *ids]
    return ids

  def _check(self, ids: Sequence[int], where: str) -> None:
    """Raises a ValueError if one of the ids, which `where` has, is beyond the vocabulary."""
    largest = max(ids, default=0)
    if self.vocabulary is not None and largest >= self.vocabulary:
      raise ValueError(no_row(where, self.token(largest), largest, self.vocabulary))

  def _begins_with_bos(self) -> bool:
    """Whether the model was trained on texts that begin with `bos`."""
    if self.bos is None:
      return False
    with tokenizer_json.sentences('the tokenizer cannot begin a text'):
      return self.encoder.encode('', add_special_tokens=True).ids[:1] == [self.bos]

  def token(self, number: int) -> str:
    """How a token is written."""
    return self.encoder.id_to_token(number)

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids, without special tokens."""
    with tokenizer_json.sentences('the tokenizer cannot write these tokens'):
      return self.encoder.decode([int(i) for i in ids], skip_special_tokens=True)

  def chat(
    self,
    messages: Sequence[Mapping[str, Any]],
    reply: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
  ) -> str:
    """A conversation as the model was trained on it.

    A template that writes the date takes that of today, or of $SOURCE_DATE_EPOCH.

    Args:
      messages: such as [{'role': 'user', 'content': 'Hello'}].
      reply: end with the opening of the model's answer.
      tools: JSON schemas of the functions that the model may call.

    Raises:
      ValueError: there is no template, or it refuses the messages.
    """
    written = self._rendered(messages, reply, tools)
    return written.replace(_OPENS, '').replace(_CLOSES, '')

  def generations(
    self,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
  ) -> list[tuple[str, bool]] | None:
    """A conversation in pieces: (text, whether the template says that the model writes it).

    A template says so by {% generation %} blocks, as for the mask of assistant tokens of
    transformers.

    Args:
      messages: of the conversation, with the answers.
      tools: JSON schemas of the functions that the model may call.

    Returns:
      The pieces, which together are `chat(messages, reply=False)`; None if the template has no such
      blocks.

    Raises:
      ValueError: there is no template, it refuses the messages, or has a block in a block.
    """
    opening, *blocks = self._rendered(messages, False, tools).split(_OPENS)
    if not blocks:
      return None
    pieces = [(opening, False)]
    for block in blocks:
      inside, closed, outside = block.partition(_CLOSES)
      if not closed or _CLOSES in outside:
        raise ValueError('the chat template has a {% generation %} block in another')
      pieces += [(inside, True), (outside, False)]
    return [(text, learnt) for text, learnt in pieces if text]

  def _rendered(
    self,
    messages: Sequence[Mapping[str, Any]],
    reply: bool,
    tools: Sequence[Mapping[str, Any]] | None,
  ) -> str:
    """What the template writes, with _OPENS and _CLOSES around its {% generation %} blocks."""
    template = self._template_for(tools)
    given = json.dumps([*messages, *(tools or ())], ensure_ascii=False, default=str)
    if _OPENS in given or _CLOSES in given:
      raise ValueError('the messages have a noncharacter, U+FDD0 or U+FDD1: leave it out')
    bos = ''
    if self.bos is not None:
      bos = self.token(self.bos)
    names = {**self.specials, 'bos_token': bos, 'eos_token': self.token(self.eos)}
    with extra('llm'):
      from . import template_sandbox  # here, since texts without chats do without it
    try:
      return template_sandbox.render(
        template_sandbox.compiled(template, (_OPENS, _CLOSES)),
        {
          'messages': list(messages),
          'tools': tools,
          'documents': None,
          'add_generation_prompt': reply,
          'raise_exception': _refuse,
          'strftime_now': _now,
          **names,
        },
      )
    except Exception as error:  # what a template does with messages of another kind is its own
      reason = str(error) or type(error).__name__
      raise ValueError(f'the chat template refuses the messages: {reason}') from error

  def _template_for(self, tools: Sequence | None) -> str:
    """The template of a chat with these tools."""
    if not self.template:
      raise ValueError('this tokenizer has no chat template: write the prompt yourself')
    if isinstance(self.template, str):
      return self.template
    if tools is not None and 'tool_use' in self.template:
      return self.template['tool_use']
    if 'default' not in self.template:
      raise ValueError(
        f"of the chat templates of this tokenizer none is called 'default': there are "
        f'{", ".join(self.template)}'
      )
    return self.template['default']


def load_tokenizer(path: str | Path) -> Tokenizer:
  """The tokenizer of a `Pretrained` (its `tokenizer`), of a folder, or of a GGUF file.

  Args:
    path: tokenizer.json, a folder with that file, or a .gguf file. The special tokens are those of
      tokenizer_config.json beside it; the chat template is in chat_template.jinja or there, where
      it may be a list of templates with names.

  Raises:
    ValueError: there are no special tokens, or a kind of tokenizer that is not supported.
  """
  path = Path(path)
  if path.suffix == '.gguf':
    return from_gguf(Gguf(path))
  if path.is_dir():
    path = path / 'tokenizer.json'
  encoder = tokenizer_json.read(path)
  # Batches are padded and cut by the caller.
  encoder.no_padding()
  encoder.no_truncation()
  file = path.with_name('tokenizer_config.json')
  config = {}
  if file.exists():
    config = read_json(file, tokenizer_json.CONFIG)
  specials = tokenizer_json.special_tokens(config, file)
  ids = {}
  for name in ('eos', 'bos', 'pad'):
    token = specials.get(f'{name}_token')
    ids[name] = encoder.token_to_id(token) if token else None
  return _tokenizer(encoder, ids, _template_of(path.parent, config), file, specials)


def _template_of(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
  """The chat template, or the named ones, of a folder with this tokenizer_config.json."""
  jinja = folder / 'chat_template.jinja'
  if jinja.exists():
    return textfiles.text_of(jinja, jsonfiles.LARGEST)
  template = config.get('chat_template')
  if isinstance(template, list):
    return {one['name']: one['template'] for one in template}
  return template


def from_gguf(file: Gguf) -> Tokenizer:
  """The tokenizer in the metadata of a GGUF file.

  Raises:
    ValueError: there are no special tokens, or a kind of tokenizer that is not supported.
  """
  with extra('llm'):
    from tokenizers import processors

  encoder, begins = encoder_of(file)
  values = {key.removeprefix('tokenizer.ggml.'): value for key, value in file.metadata.items()}
  ids = {
    'eos': values.get('eos_token_id'),
    'bos': values.get('bos_token_id'),
    'pad': values.get('padding_token_id'),
  }
  # In the encoder, so that a tokenizer.json that is saved from it has this too.
  if begins and ids['bos'] is not None:
    bos = values['tokens'][ids['bos']]
    encoder.post_processor = processors.TemplateProcessing(
      f'{bos} $A', special_tokens=[(bos, ids['bos'])]
    )
  return _tokenizer(encoder, ids, _template_of_gguf(file), file.folder)


def _template_of_gguf(file: Gguf) -> str | dict[str, str] | None:
  """The chat template, or the named ones, in the metadata of a GGUF file."""
  key = 'tokenizer.chat_template'
  names = {
    name.removeprefix(f'{key}.'): text
    for name, text in file.metadata.items()
    if name.startswith(f'{key}.')
  }
  template = file.metadata.get(key)
  if names and template:
    return {'default': template, **names}
  if names:
    return names
  return template


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
  """Writes tokenizer.json and tokenizer_config.json, for `load_tokenizer`."""
  writing.write(folder / 'tokenizer.json', tokenizer.encoder.to_str(pretty=True))
  ids = {'eos_token': tokenizer.eos, 'bos_token': tokenizer.bos, 'pad_token': tokenizer.pad}
  config = {name: tokenizer.token(i) for name, i in ids.items() if i is not None}
  template = tokenizer.template
  if template is not None and not isinstance(template, str):
    template = [{'name': name, 'template': text} for name, text in template.items()]
  config = {**tokenizer.specials, **config}
  if template is not None:
    config['chat_template'] = template
  writing.write(folder / 'tokenizer_config.json', json.dumps(config, indent=2) + '\n')


def _tokenizer(
  encoder,
  ids: Mapping[str, int | None],
  template: str | Mapping[str, str] | None,
  where: Path,
  specials: Mapping[str, str] | None = None,
) -> Tokenizer:
  """A tokenizer of the ids of 'eos', 'bos' and 'pad', which are those of the file `where`."""
  if ids['eos'] is None:
    raise ValueError(f'{where} names no end-of-text token (eos), so no text would ever end')
  pad = ids['pad']
  if pad is None:
    pad = ids['eos']
  return Tokenizer(encoder, ids['eos'], ids['bos'], pad, template, specials=specials or {})


def _refuse(message: str) -> None:
  """The `raise_exception` of templates."""
  raise ValueError(message)


def _now(form: str) -> str:
  """The date of today, or that of $SOURCE_DATE_EPOCH, which makes rows the same on any day."""
  fixed = os.environ.get('SOURCE_DATE_EPOCH')
  if fixed:
    return datetime.datetime.fromtimestamp(int(fixed), datetime.UTC).strftime(form)
  return datetime.datetime.now().strftime(form)
