"""MLPs on some tokens at a time.

The widest arrays of a block are its MLP's, which treats each token by itself. Run on n of the N
tokens of each example at a time, with the same weights, it has hidden arrays [B, n, mlp_dim] in
place of [B, N, mlp_dim], and its backward pass keeps its input alone: each piece is computed again
there. The numbers are the same. Known as TiledMLP of ALST (arXiv 2506.13996, 2025) in PyTorch.

A frozen MLP that no gradient crosses, as under LST and QST, computes nothing more. One that a
gradient crosses is computed once more, unless the block is recomputed anyhow: then the first of its
two forward passes there is not needed, and is left out.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jpeft.core import NO_BACKPROP, Call, Method, at, factory
from jpeft.programs import Static, Traced, has_gradient, mixing, plain_zero, vjp_in

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
    leaves, tree = jax.tree.flatten(arrays)

    def on_piece(leaves, x):
      return run(tree.unflatten(leaves), x, *args, **kwargs)

    count = -(-x.shape[1] // tokens)
    size = -(-x.shape[1] // count)
    piece = jax.ShapeDtypeStruct((x.shape[0], size, *x.shape[2:]), x.dtype)
    why = mixing(lambda x: on_piece(leaves, x), piece, 1)
    if why:
      raise ValueError(f'{call.site.path!r} cannot run on some tokens at a time: {why}')
    # Traced here, where the rules of the model act: the backward pass is traced after they ended.
    traced = Traced(on_piece, [jax.typeof(leaf) for leaf in leaves], piece)
    missing = count * size - x.shape[1]
    filled = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    out = _in_turn(traced, count)([*traced.consts, *leaves], filled)
    return out[:, : x.shape[1]]

  return at(mlps, Call(name, apply, merge=lambda t, site, arrays: {}, memory=NO_BACKPROP))


def _in_turn(traced: Traced, count: int) -> Callable[[Sequence[jax.Array], jax.Array], jax.Array]:
  """(values, x [B, N, ...]) -> what a function gives of `count` pieces of x, one after the other.

  The backward pass keeps values and x. A result that has the shape of what it is made of is written
  in its place, piece by piece, so that nothing of the length N is there twice.

  Args:
    traced: ((), values, a piece of x) -> the same piece of the output.
    count: of pieces; it divides N.
  """

  def part(x, i):
    size = x.shape[1] // count
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, 1)

  def put(x, i, piece):
    return jax.lax.dynamic_update_slice_in_dim(x, piece, i * piece.shape[1], 1)

  def room(x, piece):
    """Where pieces of a result are written: x, or an array of their shape."""
    shape = (x.shape[0], x.shape[1], *piece.shape[2:])
    return x if (shape, piece.dtype) == (x.shape, x.dtype) else jnp.zeros(shape, piece.dtype)

  @jax.custom_vjp
  def run(values, x):
    begun = room(x, jax.eval_shape(lambda: traced((), values, part(x, 0))))

    def step(y, i):
      given = part(y if begun is x else x, i)
      return put(y, i, traced((), values, given)), None

    return jax.lax.scan(step, begun, jnp.arange(count))[0]

  def forward(values, x):
    trained = tuple(i for i, value in enumerate(values) if has_gradient(value))
    values, x = jax.tree.map(lambda pair: pair.value, (values, x))
    return run(values, x), (values, x, Static(trained))

  def backward(kept, cotangent):
    values, x, trained = kept
    cotangent = plain_zero(cotangent)
    begun = room(cotangent, x)

    def step(carry, i):
      d, total = carry
      run_piece = functools.partial(traced, ())
      _, pull = vjp_in(run_piece, values, trained.value, part(x, i))
      of_own, of_x = pull(part(d if begun is cotangent else cotangent, i))
      return (put(d, i, of_x), jax.tree.map(jnp.add, total, of_own)), None

    zeros = [jnp.zeros_like(values[i]) for i in trained.value]
    (of_x, of_own), _ = jax.lax.scan(step, (begun, zeros), jnp.arange(count))
    found = dict(zip(trained.value, of_own, strict=True))
    return [found.get(i) for i in range(len(values))], of_x

  run.defvjp(forward, backward, symbolic_zeros=True)
  return run
