"""What tasks of texts share: the tokenizer of a backbone, and the arrays that it takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jpeft import data

from .modality import TEXT, by_tokenizer, modality_of


def arrays_of(config, pretrained) -> dict[str, np.ndarray]:
  """The arrays of a batch of one empty row.

  Raises:
    ValueError: the backbone does not read texts.
  """
  modality = modality_of(pretrained)
  if modality.name != TEXT.name:
    raise ValueError(
      f'config.task={config.task!r} reads texts, and {config.model.source} the modality '
      f'{modality.name!r}'
    )
  return modality.example(config, pretrained)


def encoder_of(config, pretrained) -> 'data.Encoder':
  """The tokenizer of a backbone, which makes rows of `data.max_length` tokens.

  Raises:
    ValueError: the backbone has no tokenizer.json, or one with tokens that it has no row for.
  """
  return by_tokenizer(data.Encoder, config, pretrained)


def check_entries(config, source, entries: Sequence[str]) -> None:
  """Raises a ValueError if the examples of a data set are not those that a task learns from."""
  example: Mapping[str, Any] = source[0]
  missing = [name for name in entries if name not in example]
  if missing:
    raise ValueError(
      f'config.task={config.task!r} needs examples with {" and ".join(map(repr, entries))}, and '
      f'those of {config.data.name} have {", ".join(map(repr, example))}'
    )


def check_unlabelled(config) -> None:
  """Raises a ValueError if a configuration says how many labels a task has that has none."""
  if config.model.num_classes is not None:
    raise ValueError(
      f'config.model.num_classes is {config.model.num_classes}, but config.task={config.task!r} '
      'has no labels'
    )
