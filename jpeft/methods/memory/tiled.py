"""MLPs on some tokens at a time.

The widest arrays of a block are its MLP's, which treats each token by itself. Run on n of the N
tokens of each example at a time, with the same weights, it has hidden arrays [B, n, mlp_dim] in
place of [B, N, mlp_dim], and its backward pass keeps its input alone: each piece is computed again
there. The numbers are the same. Known as TiledMLP of ALST (arXiv 2506.13996, 2025) in PyTorch.

A frozen MLP that no gradient crosses, as under LST and QST, costs nothing more. One that a gradient
crosses is computed once more, unless the block is recomputed anyhow: then the first of its two
forward passes there is not needed, and is left out.
"""

import functools

import jax

from jpeft.core import (
  NO_BACKPROP,
  Call,
  Method,
  at,
  cut_tokens,
  equal_pieces,
  factory,
  joined_tokens,
)
from jpeft.programs import mixing

from ..check import whole


@factory
def tiled(tokens: int, mlps: str = '{mlp}', name: str = 'tiled') -> Method:
  """Runs each MLP on some tokens at a time; trains nothing itself.

  Rules at the MLPs and in them act within each piece, those behind this one in the chain at the MLP
  itself on the whole: chain(qlora(64), tiled(512)). Fewer tokens, as where text is written, are not
  cut. `merge` leaves it out. Beside `packed`, which stores what this computes again, use one of the
  two.

  Args:
    tokens: n, of each example at a time, at most; pieces are alike, the last one filled up.
    mlps: pattern of the modules, each called with one array [B, N, ...] that it treats entry by
      entry along N.
    name: of the rule; theta has no entry.

  Raises:
    ValueError: no whole number of tokens; where the model is traced, a module that may mix tokens,
      that is called with other arrays, or in which something drops out or is recorded.
  """
  whole('tiled', 'tokens', tokens, 1)

  def apply(t, call, x, *args, **kwargs):
    if x.ndim < 3 or x.shape[1] <= tokens:
      return call(x, *args, **kwargs)
    given = [y for y in jax.tree.leaves((args, kwargs)) if hasattr(y, 'shape')]
    if given:
      raise ValueError(f'it is called with {len(given) + 1} arrays: tiled cuts one')
    run, arrays = call.pure(records=False)
    size = equal_pieces(x.shape[1], tokens)
    piece = jax.ShapeDtypeStruct((x.shape[0], size, *x.shape[2:]), x.dtype)
    why = mixing(lambda x: run(arrays, x, *args, **kwargs), piece, 1)
    if why:
      raise ValueError(f'{call.site.path!r} cannot run on some tokens at a time: {why}')

    # What the backward pass of a piece needs is not kept, but computed again from its input. In the
    # body of a scan XLA cannot merge the two computations, so that no barriers are needed.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def on_piece(arrays, x):
      return run(arrays, x, *args, **kwargs)

    _, out = jax.lax.scan(lambda _, x: (None, on_piece(arrays, x)), None, cut_tokens(x, size))
    return joined_tokens(out, x.shape[1])

  return at(mlps, Call(name, apply, merge=lambda t, site, arrays: {}, memory=NO_BACKPROP))
