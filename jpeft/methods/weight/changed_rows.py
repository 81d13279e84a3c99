"""The product of an input and a kernel, some of whose rows change: x w', w' = w but for rows I.

  dx = g w'^T        dw'_I = x_I^T g

The gradient in the rows needs the columns x_I of the input, r numbers a token, and nothing else of
it. So the backward pass keeps these and makes w' again.
"""

from collections.abc import Callable, Mapping

import jax

from jpeft.core import Operand
from jpeft.residuals import tied


def product(
  x: Operand,
  w: jax.Array,
  values: jax.Array,
  state: Mapping[str, jax.Array],
  changed: Callable,
  gradient: Callable,
) -> jax.Array:
  """x w' [..., fan_out], differentiable in x and in the values.

  Args:
    x: the input of the layer.
    w: its kernel [fan_in, fan_out], which gets no gradient.
    values: the array that is trained.
    state: integers that say where; 'inputs' are I [r].
    changed: (w, values, state) -> w'.
    gradient: (x_I [tokens, r], g [tokens, fan_out], state) -> that of the values, in float32.
  """

  def multiplied(v, w, values, state):
    return x.map(lambda _: v) @ changed(w, values, state)

  def forward(v, w, values, state):
    columns = x.map(lambda _: v).columns(state['inputs'])
    return multiplied(v, w, values, state), (columns, w, values, state)

  def backward(kept, g):
    # Tied to the cotangent: XLA could else keep the kernel of the forward pass.
    (columns, w, values, state), g = tied(kept, g)
    like = jax.ShapeDtypeStruct(x.x.shape, x.x.dtype)
    (d_x,) = jax.linear_transpose(lambda v: multiplied(v, w, values, state), like)(g)
    of_tokens = (array.reshape(-1, array.shape[-1]) for array in (columns, g))
    return d_x, None, gradient(*of_tokens, state).astype(values.dtype), None

  run = jax.custom_vjp(multiplied)
  run.defvjp(forward, backward)
  return run(x.x, w, values, state)
