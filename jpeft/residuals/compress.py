"""What the backward pass of a function stores, in few bits: of any function, found in its program.

`compressed(fn)` computes what fn computes. For its backward pass it stores few values and computes
the others again:

- the output of a weight matrix or a convolution, followed through sums to where a nonlinear
  operation reads it, and the inputs of fn: codes of 4 bits in groups of 64;
- the derivative of a known activation (`derivatives`): 4-bit codes, of ReLU one bit. Where four
  bits of it and its output are needed, or with 8 bits a value, of which a table of 4 would be the
  coarsest part, its input is stored instead, from which both follow;
- operands of products between activations (query, key, value): 8 bits. The products themselves,
  attention's logits and probabilities, are computed again: they are wide, they cost few FLOPs, and
  a code of theirs would be no smaller than their operands. An error of the operands is magnified by
  the softmax, hence the 8 bits;
- what is small (a low-rank product) and what no gradient crosses (masks, positions): as it is;
- weights and what is made of them: by reference.

Norms, dropout masks (from their keys), softmax and products of activations follow from these. fn
need not be a module. Of what may be stored (`choose`), only what a live equation of the backward
program reads is (`stored`). LayerNorm from 4-bit min-max codes of its input is as exact as from
codes of its output, since one is an affine function of the other in each row.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jpeft.programs import hoisted

from .choose import Choice, choose, choose_inputs
from .stored import evaluate, stored


def compressed(
  fn: Callable, bits: int = 4, operand_bits: int = 8, prevent_cse: bool = True
) -> Callable:
  """fn with a backward pass from few bits.

  Args:
    fn: (weights, *args, **kwargs) -> output, pure. Weights are not stored again.
    bits: of values that are stored, 4 or 8.
    operand_bits: of operands of products between activations.
    prevent_cse: whether barriers keep XLA from undoing the saving, where it sees forward and
      backward pass as one program. As of `jax.checkpoint`, they are not needed in the body of a
      scan, and cost copies there.

  Returns:
    A function of the same arguments and output, differentiable once, in reverse.
  """

  chosen = functools.partial(choose, bits=bits, operand_bits=operand_bits)
  return _with_backward(fn, chosen, prevent_cse)


def recomputed(fn: Callable, bits: int = 8, prevent_cse: bool = True) -> Callable:
  """fn, run again in the backward pass from its inputs in few bits; `jax.checkpoint` of the rest.

  The output is that of fn. Gradients are those at the inputs as they were stored: a rounding error
  of the inputs, which everything that is computed from them again shares.

  Args:
    fn: (weights, *args, **kwargs) -> output, pure. Weights are not stored again.
    bits: of a value of an input, 4 or 8. What is small, has no gradient (masks, positions) or is no
      float is stored as it is.
    prevent_cse: see `compressed`.

  Returns:
    A function of the same arguments and output, differentiable once, in reverse.
  """
  return _with_backward(fn, functools.partial(choose_inputs, bits=bits), prevent_cse)


def _with_backward(
  fn: Callable, chosen: Callable[[Any, int], Choice], prevent_cse: bool
) -> Callable:
  """fn, whose backward pass stores what `chosen` says of (its program, the number of weights)."""

  def run(weights, *args, **kwargs):
    leaves, tree = jax.tree.flatten((weights, args, kwargs))
    is_array = [isinstance(x, jax.Array | np.ndarray) for x in leaves]
    dynamic = [i for i, found in enumerate(is_array) if found]
    n_weights = sum(is_array[: len(jax.tree.leaves(weights))])
    out_trees = []

    def flat(*arrays):
      filled = list(leaves)
      for i, x in zip(dynamic, arrays, strict=True):
        filled[i] = x
      weights, args, kwargs = jax.tree.unflatten(tree, filled)
      out, out_tree = jax.tree.flatten(fn(weights, *args, **kwargs))
      out_trees.append(out_tree)
      return out

    arrays = [leaves[i] for i in dynamic]
    jaxpr, captured = _program(flat, arrays)
    # What fn closes over is treated as weights: the first inputs of the program.
    n_weights += len(captured)
    program = stored(jaxpr, n_weights, chosen(jaxpr, n_weights), prevent_cse)
    return jax.tree.unflatten(out_trees[-1], program(*captured, *arrays))

  return run


def _program(fn, arrays) -> tuple[Any, list]:
  """(a jaxpr without inner calls, what fn closes over: its first inputs)."""
  closed = jax.make_jaxpr(fn)(*arrays)
  n_consts = len(closed.consts)

  def inlined(*inputs):
    return evaluate(closed.jaxpr, inputs[n_consts:], {}, inputs[:n_consts])

  jaxpr, consts = hoisted(jax.make_jaxpr(inlined)(*closed.consts, *arrays))
  return jaxpr, [*consts, *closed.consts]
