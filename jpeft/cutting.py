"""Linear maps cut to some of their inputs and of their outputs."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Leaf, Site

# Which inputs or outputs stay, ascending; None for all.
Indices = np.ndarray | jax.Array | None


def spans(chosen: np.ndarray, parts: int, total: int) -> np.ndarray:
  """The indices of some of the equal parts that `total` numbers are split into.

  Args:
    chosen: which parts, such as heads [n].
    parts: how many there are.
    total: a multiple of it, such as the outputs of a projection to heads.
  """
  return np.arange(total).reshape(parts, -1)[chosen].ravel()


def cut_map(
  site: Site,
  arrays: Mapping[str, jax.Array],
  shapes: Mapping[str, tuple[int, ...]],
  ins: Indices = None,
  outs: Indices = None,
) -> dict[str, jax.Array]:
  """The arrays of a linear map, or of a table, with some of its inputs and of its outputs.

  Args:
    site: owns one kernel [fan_in, fan_out] as `Leaf.fold` has it, or one table [rows, columns], and
      vectors of its outputs; or such vectors alone, of which only outputs are cut.
    arrays: of one layer, by name.
    shapes: of the result.
    ins: the inputs, or rows of a table, that stay.
    outs: the outputs that stay.

  Raises:
    ValueError: the site has not one kernel or table.
  """
  if ins is None and not _kernels(site):
    return {name: _taken(x, outs, -1) for name, x in arrays.items()}
  kernel, leaf = kernel_of(site)
  folded = _taken(_taken(leaf.fold(arrays[kernel]), ins, 0), outs, 1)
  cut = {kernel: dataclasses.replace(leaf, shape=shapes[kernel]).unfold(folded)}
  for name, x in arrays.items():
    if name != kernel:
      cut[name] = _taken(x.reshape(-1), outs, 0).reshape(shapes[name])
  return cut


def kernel_of(site: Site) -> tuple[str, Leaf]:
  """(name, leaf) of the one kernel of a linear map, or of the one table that rows are taken from.

  Raises:
    ValueError: there is none, or more than one.
  """
  names = _kernels(site)
  if len(names) != 1:
    raise ValueError(
      f'{site.kind} at {site.path!r} cannot be cut: it has {len(names)} kernels, and not one'
    )
  (name,) = names
  leaf = site.leaves[name]
  if not leaf.is_matrix:
    leaf = dataclasses.replace(leaf, ins=(0,))
  return name, leaf


def _kernels(site: Site) -> list[str]:
  """The names of its kernels; if there are none, of its tables."""
  return list(site.matrices) or [name for name, leaf in site.leaves.items() if leaf.use == 'gather']


def _taken(x: jax.Array, indices: Indices, axis: int) -> jax.Array:
  if indices is None:
    return x
  return jnp.take(x, indices, axis)
