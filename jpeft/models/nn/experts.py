"""Experts: MLPs of which a router chooses a few for each token (Mixtral, arXiv:2401.04088).

No token is dropped, whatever its expert is asked for. Rows are sorted by expert and cut into tiles
of one expert each, and each tile is multiplied by the matrices of its expert (`grouped_dot`): the
FLOPs of the chosen experts, and of the empty rows of the last tile of each, about a quarter more.

Axes: T tokens, C experts chosen for each, E experts, G tiles, R rows of a tile, D width.

Deviations. The router is computed in float32 whatever the dtype of the model is. The loss that
balances the load of experts in pretraining is left out: routers are frozen.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpeft.core import grouped_dot

from .layers import MLP, default_init, gelu

# Rows of a tile: fewer cost more loops, more are emptier.
_LEAST_ROWS, _MOST_ROWS = 8, 256


@dataclasses.dataclass(frozen=True)
class Experts:
  """How the MLPs of a block are chosen.

  Attributes:
    count: number of experts E.
    chosen: how many of them a token is sent to, C.
    normalised: whether the weights of these add up to 1; else they are shares among all experts.
    shared_dim: hidden width of a further MLP that sees every token, times a gate of its own; None
      for none (Qwen2-MoE has one).

  Raises:
    ValueError: more are chosen than there are, or none.
  """

  count: int
  chosen: int
  normalised: bool = True
  shared_dim: int | None = None

  def __post_init__(self):
    if not 1 <= self.chosen <= self.count:
      raise ValueError(f'{self.chosen} experts of each token, and there are {self.count}')


class Tiles(NamedTuple):
  """Where the rows of each expert are.

  Attributes:
    sources: [G, R], the token that each row is; T for an empty row.
    groups: [G], the expert of each tile.
    places: [T, C], the row, counted over all tiles, that a token is for each of its experts.
  """

  sources: jax.Array
  groups: jax.Array
  places: jax.Array


def tiles_of(chosen: jax.Array, experts: int) -> Tiles:
  """Sorts the rows that tokens are for their experts into tiles of one expert each.

  Args:
    chosen: integers [T, C], different experts of each token.
    experts: E.
  """
  tokens, each = chosen.shape
  pairs = tokens * each
  rows = _rows_of_tile(pairs, experts)
  # An expert has at most rows - 1 empty rows, and is there only if a token chose it.
  tiles = (pairs + min(experts, pairs) * (rows - 1)) // rows
  flat = chosen.reshape(-1)
  order = jnp.argsort(flat, stable=True)  # pairs by expert
  counts = jnp.bincount(flat, length=experts)
  tiles_of_expert = -(-counts // rows)
  last_tiles = jnp.cumsum(tiles_of_expert)
  first_rows = (last_tiles - tiles_of_expert) * rows
  first_pairs = jnp.cumsum(counts) - counts
  expert = flat[order]
  place = first_rows[expert] + jnp.arange(pairs) - first_pairs[expert]
  sources = jnp.full(tiles * rows, tokens).at[place].set(order // each)
  groups = jnp.searchsorted(last_tiles, jnp.arange(tiles), side='right')
  return Tiles(
    sources.reshape(tiles, rows),
    jnp.minimum(groups, experts - 1),  # tiles that nobody needs
    jnp.zeros(pairs, place.dtype).at[order].set(place).reshape(tokens, each),
  )


def _rows_of_tile(pairs: int, experts: int) -> int:
  """R: a power of two of at most a quarter of an expert's mean number of rows."""
  rows = _LEAST_ROWS
  while rows < _MOST_ROWS and 8 * rows * experts <= pairs:
    rows *= 2
  return rows


class GroupedDense(nn.Module):
  """Linear maps without biases, one an expert, stored as one kernel [E, inputs, features].

  Attributes:
    features: width of the output.
    experts: E.
    grouped_dot: multiplies tiles by the kernels of their experts, see `jpeft.core.grouped_dot`.
    dtype: of the computation.
    param_dtype: of the kernel.
  """

  features: int
  experts: int
  grouped_dot: Callable[..., jax.Array] = grouped_dot
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, groups):
    """x [G, R, inputs] by the experts groups [G] of its tiles; returns [G, R, features]."""
    shape = (self.experts, x.shape[-1], self.features)
    kernel = self.param('kernel', default_init, shape, self.param_dtype)
    return self.grouped_dot(x.astype(self.dtype), kernel.astype(self.dtype), groups)


class GatedExperts(nn.Module):
  """fc2(activation(gate(x)) * fc1(x)) of the expert of each tile.

  Attributes:
    mlp_dim: hidden width of an expert.
    experts: E.
    activation: the nonlinearity.
    dtype: of the computation.
    param_dtype: of the parameters.
  """

  mlp_dim: int
  experts: int
  activation: Callable[[jax.Array], jax.Array]
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, groups):
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    gate = GroupedDense(self.mlp_dim, self.experts, name='gate', **types)(x, groups)
    y = GroupedDense(self.mlp_dim, self.experts, name='fc1', **types)(x, groups)
    y = self.activation(gate) * y
    return GroupedDense(x.shape[-1], self.experts, name='fc2', **types)(y, groups)


class SparseMLP(nn.Module):
  """The sum of a few experts' outputs for each token, by the weights of a router.

  Attributes:
    mlp_dim: hidden width of an expert.
    experts: how they are chosen.
    activation: the nonlinearity.
    dtype: of the computation; the router's is float32.
    param_dtype: of the parameters.
  """

  mlp_dim: int
  experts: Experts
  activation: Callable[[jax.Array], jax.Array] = gelu
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, deterministic=True):
    """x [B, N, D] -> [B, N, D]."""
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    tokens = x.reshape(-1, x.shape[-1])  # [T, D]
    router = nn.Dense(
      self.experts.count,
      use_bias=False,
      kernel_init=default_init,
      dtype=jnp.float32,
      param_dtype=self.param_dtype,
      name='router',
    )
    shares = jax.nn.softmax(router(tokens))  # [T, E]
    weights, chosen = jax.lax.top_k(shares, self.experts.chosen)  # [T, C]
    if self.experts.normalised:
      weights = weights / weights.sum(-1, keepdims=True)

    tiles = tiles_of(chosen, self.experts.count)
    rows = tokens.at[tiles.sources].get(mode='fill', fill_value=0)  # [G, R, D]
    experts = GatedExperts(
      self.mlp_dim, self.experts.count, self.activation, name='experts', **types
    )
    outputs = experts(rows, tiles.groups).reshape(-1, x.shape[-1])[tiles.places]  # [T, C, D]
    y = jnp.einsum('tc,tcd->td', weights, outputs.astype(jnp.float32)).astype(self.dtype)
    if self.experts.shared_dim is not None:
      y = y + self._shared(tokens, deterministic, types)
    return y.reshape(x.shape)

  def _shared(self, tokens, deterministic, types):
    """The output of the MLP that sees every token, times its gate."""
    shared = MLP(
      self.experts.shared_dim, self.activation, gated=True, use_bias=False, name='shared', **types
    )
    gate = nn.Dense(1, use_bias=False, kernel_init=default_init, name='shared_gate', **types)
    return jax.nn.sigmoid(gate(tokens)) * shared(tokens, deterministic=deterministic)
