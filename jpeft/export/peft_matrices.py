"""What an adapter folder says of one matrix, and whether a rule makes the same of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Leaf, Site, Sites, Weight
from jpeft.thetas import on_matrix

from .peft_kin import Adapted

PARTS = {
  'a': 'lora_A.weight',
  'b': 'lora_B.weight',
  'm': 'lora_magnitude_vector',
  'bias': 'lora_B.bias',
}
TABLE_PARTS = {**PARTS, 'a': 'lora_embedding_A', 'b': 'lora_embedding_B'}
PART_OF = {name: part for table in (PARTS, TABLE_PARTS) for part, name in table.items()}
SCALES = 'ia3_l'
NORMS = 'ln_tuning_layers'
TOKENS_DELTA = 'trainable_tokens_delta'  # the new rows of a table, no differences
_PROBE = 32  # rows and columns of a matrix on which two computations are compared


@dataclasses.dataclass
class Factors:
  """What a folder says of one matrix w [fan_in, fan_out].

  Attributes:
    module: its name in the folder.
    rank: by the config.
    alpha: by the config.
    scale: s, by the config.
    parts: a [fan_in, r], b [r, fan_out]; of DoRA m [fan_out]; a0 and b0 of a start that peft takes
      out of w first; bias [fan_out] of what is added to the output.
  """

  module: str
  rank: int
  alpha: float
  scale: float
  parts: dict[str, np.ndarray]

  def weight(self, w: np.ndarray) -> np.ndarray:
    """What peft computes in place of w, beside the bias."""
    parts = self.parts
    v = w + self.scale * (parts['a'] @ parts['b'])
    if 'a0' in parts:
      v = v - self.scale * (parts['a0'] @ parts['b0'])
    if 'm' in parts:
      v = parts['m'] / np.linalg.norm(v, axis=0) * v
    return v

  def probe(self) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of w on which it is compared."""
    return _spread(self.parts['a'].shape[0]), _spread(self.parts['b'].shape[1])

  def cut(self, rows: np.ndarray, columns: np.ndarray) -> 'Factors':
    """What is said of some rows and columns of w."""
    return dataclasses.replace(self, parts=self.cut_theta(self.parts, rows, columns))

  def cut_theta(
    self, theta: Mapping[str, Any], rows: np.ndarray, columns: np.ndarray
  ) -> dict[str, np.ndarray]:
    """theta of a rule for some rows and columns of w."""
    found = {}
    for part, x in theta.items():
      x = np.asarray(x, np.float32)
      if part in ('a', 'a0'):
        found[part] = x[rows]
      else:  # b, b0, m
        found[part] = x[..., columns]
    return found


@dataclasses.dataclass
class Scales:
  """(IA)^3 of one matrix w [fan_in, fan_out], as a folder says it.

  Attributes:
    module: its name in the folder.
    outputs: whether outputs are scaled; else inputs.
    l: the scales.
  """

  module: str
  outputs: bool
  l: np.ndarray

  def weight(self, w: np.ndarray) -> np.ndarray:
    """What peft computes in place of w, beside the bias."""
    return w * (self.l if self.outputs else self.l[:, None])

  def probe(self) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns on which it is compared; the other size of w makes no difference."""
    return _spread(len(self.l)), _spread(len(self.l))

  def cut(self, rows: np.ndarray, columns: np.ndarray) -> 'Scales':
    """What is said of some rows and columns of w."""
    return dataclasses.replace(self, l=self.cut_theta(self.l, rows, columns))

  def cut_theta(self, theta: Any, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """theta of a rule for some rows and columns of w."""
    return np.asarray(theta, np.float32)[columns if self.outputs else rows]


@dataclasses.dataclass
class Vectors:
  """VeRA of one matrix w [fan_in, fan_out], as a folder says it.

  Attributes:
    module: its name in the folder.
    parts: d [r], e [fan_out]; a [fan_in, r] and b [r, fan_out], cut out of the shared pair.
    whole: whether it is compared on whole matrices, for a rule that draws a pair for each shape.
  """

  module: str
  parts: dict[str, np.ndarray]
  whole: bool = False

  def weight(self, w: np.ndarray) -> np.ndarray:
    """What peft computes in place of w."""
    parts = self.parts
    return w + (parts['a'] * parts['d']) @ parts['b'] * parts['e']

  def probe(self) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of w on which it is compared: the first, since a rule cuts its pair so."""
    sizes = self.parts['a'].shape[0], self.parts['b'].shape[1]
    if self.whole:
      return np.arange(sizes[0]), np.arange(sizes[1])
    return np.arange(min(sizes[0], _PROBE)), np.arange(min(sizes[1], _PROBE))

  def cut(self, rows: np.ndarray, columns: np.ndarray) -> 'Vectors':
    """What is said of some rows and columns of w."""
    parts = self.parts
    own = self.cut_theta({'d': parts['d'], 'e': parts['e']}, rows, columns)
    pair = {'a': parts['a'][rows], 'b': parts['b'][:, columns]}
    return dataclasses.replace(self, parts={**own, **pair})

  def cut_theta(
    self, theta: Mapping[str, Any], rows: np.ndarray, columns: np.ndarray
  ) -> dict[str, np.ndarray]:
    """theta of a rule for some rows and columns of w."""
    return {'d': np.asarray(theta['d']), 'e': np.asarray(theta['e'])[columns]}


def lone_site(path: str, array: str, shape: tuple[int, int]) -> Site:
  """A site with one kernel or table, for asking a rule what it makes of it."""
  use = 'gather' if array == 'embedding' else 'dot_general'
  leaf = Leaf(shape, jnp.dtype('float32'), use, ins=(0,))
  return Site(path, '', {array: leaf}, {}, None, (), (), (), None, None, (), {}, Sites())


def check_same(
  where: Any,
  stored: Factors | Scales | Vectors | Adapted,
  rule: Weight,
  site: Site,
  array: str,
  t: Any,
) -> None:
  """Raises a ValueError unless a rule makes of matrices what a folder says.

  Both get a random matrix in place of some rows and columns of the kernel.

  Args:
    where: the file, for the message.
    stored: by the folder.
    rule: that adapts the matrix here.
    site: where.
    array: name of the matrix in the site.
    t: theta of the rule for this layer.
  """
  rows, columns = stored.probe()
  w = np.random.default_rng(0).standard_normal((len(rows), len(columns))).astype(np.float32)
  want = stored.cut(rows, columns).weight(w)
  t = jax.tree.map(jnp.asarray, stored.cut_theta(t, rows, columns))
  found = np.asarray(on_matrix(rule, site, array, t, jnp.asarray(w)))
  bound = 1e-4 * np.abs(want - w).max() + 1e-5 * np.abs(want).max()
  apart = np.abs(found - want).max()
  if not apart <= bound:
    raise ValueError(
      f'{where}: by its config {stored.module!r} computes something else than {rule.name!r} at '
      f'{site.path!r} does (largest difference {apart:.2g} on a random matrix): such a folder '
      'cannot hold what this rule computes'
    )


def _spread(size: int) -> np.ndarray:
  """Up to _PROBE numbers below a size, evenly spread."""
  return np.unique(np.linspace(0, size - 1, min(size, _PROBE)).astype(int))
