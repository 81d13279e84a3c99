"""Prompts and prefixes as peft stores them: one array `prompt_embeddings`, for rules and back.

Prompt tuning: [p, d], rows before the embedded words; of an encoder-decoder [2 p, d], of which peft
reads the first p. P-tuning stores the rows that its encoder made, so a folder of it is one of
prompt tuning.

Prefix tuning: [m, 2 L J K], viewed as [m, 2 L, J, K]: the keys of layer i at 2 i, its values at
2 i + 1. peft passes them as a cache of m tokens, so that words are at m, m + 1, ... and a key k of
the cache, which nothing rotates, meets queries rotated by R(m + i). jpeft counts words from 0:

  (R(m + i) q) . k = (R(i) q) . (R(-m) k),

so R(-m) k are the keys of the same function here.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jpeft.models import T5, Bert, Gpt, Llama, is_decoder

from .peft_config import PREFIX_TUNING, PROMPT_TUNING
from .peft_names import Arrays, joined, layers_of

ROWS = 'prompt_embeddings'
_NUMBER = re.compile(r'\.(\d+)\.')
_KERNEL = 'key/kernel'
# What theta of the rules has at a site.
_PROMPTS, _PREFIX = {'prompts'}, {'keys', 'values'}


def taken_apart(theta: Mapping) -> tuple[str | None, str, dict, dict]:
  """(peft_type or None, name, {site path: arrays} of prompts or a prefix, the rest of theta).

  Raises:
    ValueError: there are several of them.
  """
  found: tuple[str | None, str, dict] = None, '', {}
  rest = {}
  for name, sites in theta.items():
    entries = {frozenset(arrays) for arrays in sites.values()}
    if entries == {frozenset(_PROMPTS)}:
      kind = PROMPT_TUNING
    elif entries == {frozenset(_PREFIX)}:
      kind = PREFIX_TUNING
    else:
      rest[name] = sites
      continue
    if found[0] is not None:
      raise ValueError(
        f'theta holds {found[1]!r} and {name!r}: an adapter folder is of one of them'
      )
    found = kind, name, dict(sites)
  return *found, rest


def check_served(where: Any, kind: str, arrays: Arrays) -> None:
  """Raises a ValueError if peft does not run such an adapter on a model of this kind, as we do."""
  model = arrays.pretrained.model
  architecture = arrays.table.architectures[1]
  if kind == PREFIX_TUNING:
    if isinstance(model, Gpt):
      raise ValueError(
        f'{where}: peft passes a prefix as a cache, behind which {architecture} counts its '
        'positions, and jpeft.prefix moves no token: such a folder is not supported'
      )
    serves = isinstance(model, Llama) and architecture.endswith('ForCausalLM')
    if serves and model.window is not None:
      raise ValueError(
        f'{where}: {architecture} with a window of {model.window} tokens loses a prefix of peft as '
        'the text goes on, and jpeft.prefix stays in sight: such a folder is not supported'
      )
    if not serves:
      raise ValueError(
        f'{where}: peft passes a prefix as a cache, which {architecture} does not take: it serves '
        'decoders that write text; jpeft.thetas and jpeft.training keep a prefix of this model'
      )
    return
  reads_first = isinstance(model, Bert) and architecture.endswith('ForSequenceClassification')
  writes = is_decoder(model) and architecture.endswith(('ForCausalLM', 'LMHeadModel'))
  translates = isinstance(model, T5) and architecture.endswith('ForConditionalGeneration')
  if not (reads_first or writes or translates):
    raise ValueError(
      f'{where}: peft puts prompts before the words of classifiers of the BERT family, of decoders '
      f'that write text and of T5; {architecture} is none of them'
    )


# ---- Reading.


def read_rows(
  where: Any, kind: str, rows: np.ndarray, config: Mapping, arrays: Arrays
) -> dict[str, dict[str, np.ndarray]]:
  """{site path: arrays} of what a folder has; of a scanned stack [layers, ..].

  Args:
    where: the file, for messages.
    kind: PREFIX_TUNING, or PROMPT_TUNING.
    rows: `prompt_embeddings`.
    config: of the folder.
    arrays: of the backbone.

  Raises:
    ValueError: the shape is not that of the backbone.
  """
  check_served(where, kind, arrays)
  count = config['num_virtual_tokens']
  if kind == PROMPT_TUNING:
    site, width = _word_table(arrays)
    copies = {1, 2} if isinstance(arrays.pretrained.model, T5) else {1}
    if rows.shape not in {(copy * count, width) for copy in copies}:
      raise ValueError(
        f'{where}: {ROWS} is {list(rows.shape)}, and {count} words of this backbone are '
        f'{[count, width]}'
      )
    return {site: {'prompts': rows[:count]}}
  stacks = _attention(arrays)
  depth = sum(map(len, stacks.values()))
  heads = _heads(where, arrays)
  if rows.shape != (count, 2 * depth * heads[0] * heads[1]):
    raise ValueError(
      f'{where}: {ROWS} is {list(rows.shape)}, and keys and values of {count} tokens in {depth} '
      f'layers of this backbone, {heads[0]} heads of {heads[1]}, are '
      f'{[count, 2 * depth * heads[0] * heads[1]]}'
    )
  entries = rows.reshape(count, 2 * depth, *heads)
  found = {}
  for site, numbers in stacks.items():
    place, _ = arrays.places[f'{site}/{_KERNEL}']
    keys = [_turned(entries[:, 2 * i], -count, arrays) for i in numbers]
    values = [entries[:, 2 * i + 1] for i in numbers]
    found[site] = {'keys': joined(keys, place), 'values': joined(values, place)}
  return found


# ---- Writing.


def write_rows(
  where: Any, kind: str, name: str, sites: Mapping[str, Mapping], arrays: Arrays
) -> tuple[np.ndarray, dict[str, Any]]:
  """(`prompt_embeddings`, what the config says of them) of what theta has.

  Args:
    where: the file, for messages.
    kind: PREFIX_TUNING, or PROMPT_TUNING.
    name: of the rule.
    sites: {site path: arrays}.
    arrays: of the backbone.

  Raises:
    ValueError: peft does not serve the model, or theta has rows elsewhere than peft.
  """
  check_served(where, kind, arrays)
  stacks = _attention(arrays)
  if kind == PROMPT_TUNING:
    site, width = _word_table(arrays)
    if set(sites) != {site}:
      raise ValueError(
        f'{name!r} has prompts at {", ".join(sites)}: peft has them before the words, where '
        f'jpeft.prompt_tuning puts them ({site!r})'
      )
    rows = np.asarray(sites[site]['prompts'], np.float32)
    heads = arrays.pretrained.model.heads
    told: dict[str, Any] = {'prompt_tuning_init': 'RANDOM'}
  else:
    if set(sites) != set(stacks):
      raise ValueError(
        f'{name!r} acts at {", ".join(sites)}: peft has a prefix in all layers, {", ".join(stacks)}'
      )
    heads, size = _heads(where, arrays)
    width = heads * size
    layers = {}
    for site, numbers in stacks.items():
      place, _ = arrays.places[f'{site}/{_KERNEL}']
      split = [layers_of(sites[site][part], place) for part in ('keys', 'values')]
      if len(split[0]) != len(numbers):
        raise ValueError(f'{name!r} acts in some layers of {site!r}: peft has a prefix in all')
      for number, keys, values in zip(numbers, *split, strict=True):
        turned = _turned(np.asarray(keys, np.float32), len(keys), arrays)
        layers[number] = np.stack([turned, values], 1)  # [m, 2, J, K]
    ordered = [layers[number] for number in sorted(layers)]
    rows = np.concatenate(ordered, 1).astype(np.float32).reshape(len(ordered[0]), -1)
    told = {'prefix_projection': False, 'encoder_hidden_size': width}
  return rows, told | {
    'num_virtual_tokens': len(rows),
    'token_dim': width,
    'num_transformer_submodules': 1,
    'num_attention_heads': heads,
    'num_layers': arrays.pretrained.model.depth,
  }


# ---- Both.


def _word_table(arrays: Arrays) -> tuple[str, int]:
  """(path of the module that looks words up, the width of a word)."""
  for site in ('embed/word', 'embed'):
    if f'{site}/embedding' in arrays.places:
      place, _ = arrays.places[f'{site}/embedding']
      return site, place.shape[-1]
  raise ValueError('the model looks up no words')


def _attention(arrays: Arrays) -> dict[str, list[int]]:
  """{path of an attention module: numbers of the layers that it stands for}."""
  found = {}
  for path, (_, keys) in arrays.places.items():
    if path.endswith(f'/attention/{_KERNEL}'):
      numbers = [_NUMBER.search(key) for key in keys]
      found[path.removesuffix(f'/{_KERNEL}')] = [int(match[1]) for match in numbers if match]
  return found


def _heads(where: Any, arrays: Arrays) -> tuple[int, int]:
  """(key and value heads, head size) of all layers.

  Raises:
    ValueError: layers differ.
  """
  model = arrays.pretrained.model
  widths = {arrays.places[f'{site}/{_KERNEL}'][0].shape[-1] for site in _attention(arrays)}
  if len(widths) > 1 or isinstance(model.heads, tuple):
    raise ValueError(
      f'{where}: layers of this backbone differ in their heads, and a prefix has one'
    )
  size = model.head_dim or model.width // model.heads
  return widths.pop() // size, size


def _turned(x: np.ndarray, by: int, arrays: Arrays) -> np.ndarray:
  """Keys [m, J, K] turned by a number of positions."""
  rope = arrays.pretrained.model.rope._replace(magnitude=1.0)
  frequencies = rope.frequencies(x.shape[-1]).astype(np.float64)
  cos, sin = np.cos(by * frequencies), np.sin(by * frequencies)
  left, right = np.split(x.astype(np.float64), 2, -1)
  turned = [left * cos - right * sin, right * cos + left * sin]
  return np.concatenate(turned, -1).astype(np.float32)
