"""What a method needs of a pass over training examples before training."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

# {name: array} of what a pass found.
Found = Mapping[str, np.ndarray]


class MovedLayer(NamedTuple):
  """Where one layer of a narrow module was in the wide model.

  Attributes:
    path: of the wide module.
    layer: its position in the stack.
    ins, outs: which inputs and outputs of its linear map stayed; None for all.
  """

  path: str
  layer: int
  ins: np.ndarray | None
  outs: np.ndarray | None


class Moved(NamedTuple):
  """A module of a narrow model.

  Attributes:
    stacked: whether its layers are stacked.
    layers: the origin of each.
  """

  stacked: bool
  layers: tuple[MovedLayer, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Preparation:
  """A pass over training examples before training, and the method that follows from it.

  Attributes:
    what: it finds out, as a sentence goes on behind the method's name: 'chooses channels'.
    find: (a `Pass`) -> {name: array}, what is found.
    resolve: {name: array} -> the method with it.
    told: {name: array} -> a sentence about what was found.
    size: examples in a batch of the pass, where nobody says otherwise.
    batches: how many batches are read at most; None for all examples once.
    again: whether examples are gone over again, in another order, until there are `batches`.
    bound: how the method's shapes before the pass relate to those after it, for plans; '' where
      they are the same.
    moved: (what was found, {path in a narrow model: where its layers come from}) -> what was found,
      for that model. None where the method cuts no parts off.
    whole: gives the method that reads a trained theta on the model from which nothing was cut, see
      `whole_of`. None where what was cut stays cut.
    sized: (pattern -> sites of a model) -> what is found there, where its shapes and the number of
      parts that stay follow from the model: plans are then of a narrow model of the right size.
      None where the examples say how much is cut.
    stored: {name: array} -> the method that, merged into the backbone, gives the kernels to be
      stored in 4 bits, see `to_store`; None where that is the backbone itself.
    name: of the method, the first of its names where it is left out; see `prepared_by`.
    found: what was found; None before the pass, and {} where the shapes before it are enough, see
      `stand_in`.
  """

  what: str
  find: Callable[[Any], Found]
  resolve: Callable[[Found], Any]
  told: Callable[[Found], str]
  size: int = 32
  batches: int | None = None
  again: bool = False
  bound: str = ''
  moved: Callable[[Found, Mapping[str, 'Moved']], Found] | None = None
  whole: Callable[[], Any] | None = None
  sized: Callable[[Callable[[str], list]], Found] | None = None
  stored: Callable[[Found], Any] | None = None
  name: str = ''
  found: Found | None = None


def unprepared(method: Iterable[tuple[str, Any]]) -> list[Preparation]:
  """The passes that a method waits for, each once."""
  found = [rule.preparation for _, rule in method if rule.preparation is not None]
  return list(dict.fromkeys(one for one in found if one.found is None))


def before_storage(method: Iterable[tuple[str, Any]]) -> bool:
  """Whether a pass of a method reads whole kernels that are stored in 4 bits only after it."""
  done = (rule.preparation for _, rule in method if rule.preparation is not None)
  return any(preparation.moved or preparation.stored for preparation in done)


def bounds(method: Iterable[tuple[str, Any]]) -> list[str]:
  """How the shapes of a method relate to those after its passes, a sentence each."""
  found = {}
  for _, rule in method:
    preparation = rule.preparation
    if preparation is not None and preparation.found == {} and preparation.bound:
      found[preparation.bound] = None
  return list(found)
