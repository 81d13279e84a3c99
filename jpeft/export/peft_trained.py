"""Arrays that were trained whole in an adapter folder: modules, biases, rows of tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jpeft.models import Place

from .peft_config import LN_TUNING, LORA, TOKENS
from .peft_content import Content
from .peft_matrices import NORMS, TOKENS_DELTA
from .peft_names import Arrays, module_of
from .peft_tied import HEAD


def is_norm(place: Place) -> bool:
  """Whether an array is the scale of a norm."""
  return place.path.endswith('/scale') and place.leaf.suffix == '.weight'


def check_shape(values: Any, place: Place) -> None:
  """Raises a ValueError if theta has another array than that of the backbone."""
  shape = np.shape(values)[1:] if place.stacked else np.shape(values)
  if shape != place.shape:
    raise ValueError(
      f'theta has an array {list(shape)} for {place.path!r}, which is {list(place.shape)}: an '
      'adapter folder holds arrays that were trained whole'
    )


def add_trained(content: Content, arrays: Arrays, trained: Mapping) -> None:
  """Adds what was trained whole: modules, and biases of other modules."""
  owned: dict[str, set[str]] = {}  # {module: paths of its arrays}
  for path, (_, keys) in arrays.places.items():
    for key in keys:
      owned.setdefault(module_of(key), set()).add(path)
  adapted = {
    *content.adapted,
    *content.scaled,
    *content.kin,
    *content.told.get('target_modules', ()),
  }
  for path, (keys, layers) in trained.items():
    place, _ = arrays.places[path]
    rows = _rows_of(content, arrays, path, layers)
    if rows is not None:
      module = module_of(keys[0])
      content.tokens[module] = rows
      middle = '' if content.kind == TOKENS else '.token_adapter'
      content.tensors[f'{module}{middle}.{TOKENS_DELTA}'] = place.leaf.theirs(layers[0])[rows]
      continue
    if path == arrays.tied and content.kind != LORA:
      raise ValueError(
        f'{path!r} is the head of the model as well, which peft keeps so beside LoRA alone: load '
        'the backbone through jpeft.models.untied'
      )
    for key, layer in zip(keys, layers, strict=True):
      module = module_of(key)
      if owned[module] <= trained.keys() and module not in adapted:
        content.whole.add(module)
        if content.kind == LN_TUNING and any(is_norm(arrays.places[p][0]) for p in owned[module]):
          content.norms.add(module)
          key = f'{module}.{NORMS}{place.leaf.suffix}'
      elif path.endswith('/bias') and content.kind == LORA:
        content.biases = True
        if module in adapted:
          key = f'{module}.base_layer.bias'
      elif module in adapted:
        raise ValueError(
          f'theta trains {path!r} and adapts it: an adapter folder holds one of the two'
        )
      else:
        raise ValueError(
          f'theta trains only a part of {path.rpartition("/")[0]!r}, with {path!r}: an adapter '
          'folder holds modules trained whole, and biases beside LoRA'
        )
      content.tensors[key] = place.leaf.theirs(layer)
    if path == arrays.tied:
      content.tied = True
      content.tensors[f'{HEAD}.weight'] = content.tensors[keys[0]]


def _rows_of(
  content: Content, arrays: Arrays, path: str, layers: Sequence[np.ndarray]
) -> list[int] | None:
  """The rows of a table that differ from the backbone's, where the folder has them alone.

  So it is where peft has no other way, and where they are fewer than half.

  Raises:
    ValueError: peft has no way at all.
  """
  needed = content.kind == TOKENS or path == arrays.unread_table
  if not path.endswith('/embedding') or content.kind not in (LORA, TOKENS):
    if path == arrays.unread_table:
      raise ValueError(
        f'theta trains {path!r}, which in transformers is a module that no layer of T5 reads: '
        'peft trains rows of it alone, or beside LoRA'
      )
    return None
  base = arrays.layers(path)
  if base is None:
    if not needed:
      return None
    raise ValueError(
      f'theta trains {path!r}, of which peft holds the rows that differ from those of the '
      'backbone: give the backbone itself, not its shapes'
    )
  differ = np.flatnonzero((np.asarray(layers[0]) != np.asarray(base[0])).any(1)).tolist()
  if needed and not differ:
    return [0]
  return differ if needed or 0 < len(differ) < len(base[0]) / 2 else None
