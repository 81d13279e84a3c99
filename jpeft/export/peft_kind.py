"""One kind of peft that changes kernels: its tensors, its hyperparameters, what it computes.

peft keeps matrices as torch does, [fan_out, fan_in].
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jpeft.core import Method

from .peft_config import alpha_of, rank_of

Tensors = Mapping[str, np.ndarray]
# Hyperparameters of a factory: ((name, value), ...).
Told = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Shared:
  """Arrays that all kernels of a folder share.

  Attributes:
    tensors: {part: name of its tensor in the file}. What a kernel reads of them is among the
      tensors that `Kin.change` gets.
    written: (hyperparameters of a rule, what its theta has at the path '', shapes of the kernels
      [fan_in, fan_out]) -> the tensors by parts.
    given: (the tensors by parts) -> further hyperparameters of the factory.
    theta: (the tensors by parts) -> what theta has at the path ''.
    expand: (theta of one kernel, the tensors by parts, hyperparameters) -> what the rule reads.
  """

  tensors: Mapping[str, str]
  written: Callable[[Mapping, Mapping, Sequence[tuple[int, int]]], dict[str, np.ndarray]]
  given: Callable[[Tensors], dict[str, Any]] = lambda tensors: {}
  theta: Callable[[Tensors], dict[str, np.ndarray]] = lambda tensors: {}
  expand: Callable[[Mapping, Tensors, Mapping], Mapping] = lambda t, tensors, told: t


@dataclasses.dataclass(frozen=True)
class Kin:
  """One kind of adapters.

  Attributes:
    kind: peft_type.
    make: the factory of the method here.
    parts: {part of theta: name of its tensor, behind that of the module}.
    told: (config, module) -> hyperparameters of the factory.
    fields: hyperparameters -> fields of the config.
    change: (tensors by parts, as stored; w [fan_out, fan_in]; hyperparameters) -> what peft
      computes in place of w.
    patterns: {hyperparameter: the field that tells other values of it for some modules}.
    ours: (tensors by parts) -> theta of one kernel.
    theirs: the inverse of `ours`.
    shared: what kernels share, if there is something.
  """

  kind: str
  make: Callable[..., Method]
  parts: Mapping[str, str]
  told: Callable[[Mapping, str], dict[str, Any]]
  fields: Callable[[Mapping], dict[str, Any]]
  change: Callable[[Tensors, np.ndarray, Mapping], np.ndarray]
  patterns: Mapping[str, str]
  ours: Callable[[Tensors, Mapping], dict[str, np.ndarray]]
  theirs: Callable[[Tensors], dict[str, np.ndarray]]
  shared: Shared | None = None

  @property
  def factory(self) -> str:
    return self.make.__name__

  def split(self, key: str) -> tuple[str, str] | None:
    """(module, part) of the name of a tensor; None if it is not of this kind."""
    for part, tensor in self.parts.items():
      if key.endswith(f'.{tensor}'):
        return key.removesuffix(f'.{tensor}'), part
    return None

  def shared_part(self, name: str) -> str | None:
    """The part that a tensor is of what kernels share; None if it is of none.

    peft may store it once more under the name of each module.
    """
    for part, tensor in (self.shared.tensors if self.shared else {}).items():
      if name.endswith(tensor.removeprefix('base_model')):
        return part
    return None


def transposed(tensors: Tensors, told: Mapping | None = None) -> dict[str, np.ndarray]:
  return {part: np.ascontiguousarray(x.T) for part, x in tensors.items()}


def as_stored(tensors: Tensors, told: Mapping | None = None) -> dict[str, np.ndarray]:
  return dict(tensors)


def ranked(field: str):
  """(config, module) -> rank and alpha, the latter in a field of the config."""

  def told(config: Mapping, module: str) -> dict[str, Any]:
    if not config:
      return {'rank': None, 'alpha': None}
    return {'rank': rank_of(config, module), 'alpha': alpha_of(config, module, field)}

  return told


RANKS = {'rank': 'rank_pattern', 'alpha': 'alpha_pattern'}
