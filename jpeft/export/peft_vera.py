"""VeRA in an adapter folder: vectors of the matrices, around one random pair for all."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jpeft.core import Rule, Tuned
from jpeft.methods import vera_pair
from jpeft.models import Place

from .peft_content import Content
from .peft_names import UNWRAPPED, Arrays, layers_of
from .peft_theta import rule_of


def is_vera(values: Mapping) -> bool:
  """Whether theta has the two vectors of VeRA for a kernel."""
  return values.keys() == {'d', 'e'}


def drawing_rule(tuned: Tuned | None, name: str, path: str) -> Rule:
  """The rule of VeRA at a site, which knows its random pair.

  Raises:
    ValueError: there is none, or it was made by another factory.
  """
  if tuned is None:
    raise ValueError(f'save_adapter: give tuned=, whose rules know the random pair of {name!r}')
  rule, _ = rule_of(tuned, name, path)
  if rule.origin is None or rule.origin.factory != 'vera':
    raise ValueError(
      f'{name!r} at {path!r} is no rule of jpeft.vera: nothing tells its random pair'
    )
  return rule


class Pairs:
  """VeRA of several layers around the one pair a, b that peft has for all of them.

  Of a pair of its own each shape of kernels gets a block of the rank: d is zero in the others.
  """

  def __init__(self, arrays: Arrays):
    self.arrays = arrays
    self.blocks: dict[Any, tuple[np.ndarray, np.ndarray]] = {}
    self.vectors: dict[str, tuple[Any, np.ndarray, np.ndarray]] = {}  # {module: (block, d, e)}

  def add(self, rule: Rule, place: Place, modules: Sequence[str], values: Mapping) -> None:
    """Adds the vectors of one array.

    Raises:
      ValueError: peft has no VeRA of such an array, or two at it.
    """
    if len(place.shape) != 2:
      raise ValueError(f'VeRA of {place.path!r}: peft has it of linear layers alone')
    hyper = rule.origin.hyperparameters if rule.origin else {}
    given = hyper['projections']
    block = (rule.name,) if given is not None else (rule.name, *place.shape)
    if block not in self.blocks:
      pair = given if given is not None else vera_pair(hyper['seed'], hyper['rank'], *place.shape)
      self.blocks[block] = np.asarray(pair[0]), np.asarray(pair[1])
    layers = (layers_of(np.asarray(values[part]), place) for part in 'de')
    for module, d, e in zip(modules, *layers, strict=True):
      if module in self.vectors:
        raise ValueError(f'theta has VeRA twice at {module!r}: an adapter folder holds one')
      self.vectors[module] = block, d, e

  def write(self, content: Content) -> None:
    """Writes the pair and all vectors."""
    ranks = {block: a.shape[1] for block, (a, _) in self.blocks.items()}
    shapes = [
      self.arrays.places[self.arrays.home(f'{m}.weight', m)[0]][0].shape for m in self.vectors
    ]
    fan_in, fan_out = (max(sizes) for sizes in zip(*shapes, strict=True))
    rank = sum(ranks.values())
    a, b = np.zeros((fan_in, rank), np.float32), np.zeros((rank, fan_out), np.float32)
    starts = {}
    start = 0
    for block, (own_a, own_b) in self.blocks.items():
      end = start + ranks[block]
      a[: len(own_a), start:end] = own_a[:fan_in]
      b[start:end, : own_b.shape[1]] = own_b[:, :fan_out]
      starts[block] = start
      start = end
    for module, (block, d, e) in self.vectors.items():
      whole = np.zeros(rank, np.float32)
      whole[starts[block] : starts[block] + ranks[block]] = d
      content.tensors[f'{module}.vera_lambda_d'] = whole
      content.tensors[f'{module}.vera_lambda_b'] = e
    content.shared |= {f'{UNWRAPPED}vera_A': a.T, f'{UNWRAPPED}vera_B': b.T}
    content.told = {
      'r': rank,
      'target_modules': sorted(self.vectors),
      'projection_prng_key': 0,
      'save_projection': True,
      'vera_dropout': 0.0,
      'bias': 'none',
      'fan_in_fan_out': False,
    }
