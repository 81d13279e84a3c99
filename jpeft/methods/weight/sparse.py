"""Single entries of a kernel that are trained: x (w + D), D zero but for entries (i_k, o_k).

D holds delta_k at row i_k and column o_k of w [fan_in, fan_out]. The gradient of one entry needs
one column of x and one of the cotangent g,

  d delta_k = sum over tokens of x[:, i_k] g[:, o_k]

so that the backward pass stores the columns of x that some entry reads, each once, and forms no
gradient of the size of w.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Operand

from . import changed_rows

# Entries whose columns are multiplied at a time.
_CHUNK = 256


def entries_of(rows: np.ndarray, columns: np.ndarray) -> dict[str, np.ndarray]:
  """The state of some entries: where they are in the kernel.

  Args:
    rows, columns: i and o, [c].

  Returns:
    'inputs': rows that some entry is in, each once [u]. 'at': which of these each entry is in [c].
    'out': o [c].
  """
  inputs, at = np.unique(rows, return_inverse=True)
  state = {'inputs': inputs, 'at': at.reshape(-1), 'out': columns}
  return {name: np.asarray(x, np.int32) for name, x in state.items()}


def filled(states: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """The state of the entries of all layers, [layers, ...]; what fills up a layer is 0."""
  whole = {}
  for name in states[0]:
    most = max(len(state[name]) for state in states)
    whole[name] = np.stack([np.pad(state[name], (0, most - len(state[name]))) for state in states])
  return whole


def added(t: Mapping[str, jax.Array], w: jax.Array) -> jax.Array:
  """w + D, for w [fan_in, fan_out]."""
  rows = t['inputs'][t['at']]
  return w.at[rows, t['out']].add(t['delta'].astype(w.dtype))


def product(t: Mapping[str, jax.Array], x: Operand, w: jax.Array) -> jax.Array:
  """x (w + D) [..., fan_out], differentiable in x and delta.

  Args:
    t: 'delta', with the state of `entries_of`.
    x: the input of the layer.
    w: its kernel, which gets no gradient.
  """

  def changed(w, delta, state):
    return added({**state, 'delta': delta}, w)

  def of_entries(columns, g, state):
    return gradient(columns, g, state['at'], state['out'])

  state = {name: t[name] for name in ('inputs', 'at', 'out')}
  return changed_rows.product(x, w, t['delta'], state, changed, of_entries)


def gradient(columns: jax.Array, g: jax.Array, at: jax.Array, out: jax.Array) -> jax.Array:
  """The gradients [c] of entries, some at a time.

  Args:
    columns: of the input, [..., u].
    g: cotangent of the product, [..., fan_out].
    at, out: for each entry its column of both.
  """
  columns = columns.reshape(-1, columns.shape[-1])
  g = g.reshape(-1, g.shape[-1])
  count = at.shape[0]
  chunk = min(_CHUNK, count)
  padding = -count % chunk

  def of_some(places):
    a, o = places
    return jnp.einsum('tk,tk->k', columns[:, a], g[:, o], preferred_element_type=jnp.float32)

  places = [jnp.pad(x, (0, padding)).reshape(-1, chunk) for x in (at, out)]
  return jax.lax.map(of_some, tuple(places)).reshape(-1)[:count]
