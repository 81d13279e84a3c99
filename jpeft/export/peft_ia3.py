"""(IA)^3 in an adapter folder: one number for each input or output of a kernel."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft.core import Tuned
from jpeft.models import Place
from jpeft.thetas import on_matrix

from .peft_content import Content
from .peft_matrices import SCALES
from .peft_names import Arrays, module_of
from .peft_theta import rule_of


def is_scales(values: Any, place: Place) -> bool:
  """Whether theta has one number for each input or output of a kernel."""
  if isinstance(values, Mapping) or len(place.shape) < 2:
    return False
  return np.ndim(values) == 1 + place.stacked


def of_outputs(name, path, array, values, arrays: Arrays, tuned: Tuned | None) -> bool:
  """Whether theta scales the outputs of a kernel, and not its inputs."""
  place, _ = arrays.places[f'{path}/{array}']
  if tuned is not None:
    rule, site = rule_of(tuned, name, path)
    scaled_ones = on_matrix(rule, site, array, jnp.array([2.0, 3.0]), jnp.ones((2, 2)))
    return bool(scaled_ones[0, 1] == 3)
  size, (fan_in, fan_out) = np.shape(values)[-1], place.shape[-2:]
  if fan_in == fan_out:
    raise ValueError(
      f'theta has {size} numbers for {path!r}, whose inputs and outputs are as many: give tuned=, '
      'whose rules tell which of them are scaled'
    )
  return size == fan_out


def add_scales(content: Content, keys, outputs: bool, layers: Sequence[np.ndarray]) -> None:
  """Adds the scales of one array."""
  for key, l in zip(keys, layers, strict=True):
    module = module_of(key)
    if module in content.scaled:
      raise ValueError(f'theta scales {module!r} twice: an adapter folder has one scale for it')
    content.scaled[module] = outputs
    content.tensors[f'{module}.{SCALES}'] = l[:, None] if outputs else l[None]
