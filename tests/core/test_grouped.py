"""Products of tiles with a stack of matrices: values, gradients, rules that act beside them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import planning
from jpeft.core import Weight, at, grouped_dot
from jpeft.models.nn.experts import GroupedDense
from tests.fixtures import noisy

GROUPS = jnp.array([0, 2, 2, 0])
X = jax.random.normal(jax.random.key(0), (4, 3, 5))
W = jax.random.normal(jax.random.key(1), (3, 5, 2))


class Tiles(nn.Module):
  """One stack of matrices; the second of three is never asked for."""

  @nn.compact
  def __call__(self, x):
    return GroupedDense(2, 3, name='maps')(x, GROUPS)


def test_values_and_gradients_are_those_of_matrices_picked_one_by_one():
  def loss(product):
    return jax.value_and_grad(lambda x, w: (product(x, w) ** 2).sum(), (0, 1))(X, W)

  got = loss(lambda x, w: grouped_dot(x, w, GROUPS))
  want = loss(lambda x, w: jnp.einsum('gti,gio->gto', x, w[GROUPS]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
  assert not got[1][1][1].any()  # of the matrix that no tile asked for


@pytest.mark.parametrize(
  'method',
  [
    jpeft.lora(2, targets='maps'),
    jpeft.dora(2, targets='maps'),
    jpeft.chain(jpeft.lora(2, targets='maps'), jpeft.dora(1, targets='maps')),
  ],
  ids=['lora', 'dora', 'chain'],
)
def test_rules_of_one_matrix_act_beside_the_stack(method):
  variables = {'params': {'maps': {'kernel': W}}}
  tuned = jpeft.attach(Tiles(), method, variables, X)
  theta = noisy(tuned.init(jax.random.key(2), variables), 0.3)
  merged = tuned.merge(theta, variables)
  np.testing.assert_allclose(
    tuned.apply(theta, variables, X), Tiles().apply(merged, X), rtol=1e-4, atol=1e-4
  )


def test_the_gradient_of_lora_is_that_of_changed_kernels():
  variables = {'params': {'maps': {'kernel': W}}}
  tuned = jpeft.attach(Tiles(), jpeft.lora(2, targets='maps'), variables, X)
  theta = noisy(tuned.init(jax.random.key(2), variables), 0.3)

  def beside(theta):
    return (tuned.apply(theta, variables, X) ** 2).sum()

  def merged(theta):
    return (Tiles().apply(tuned.merge(theta, variables), X) ** 2).sum()

  got, want = jax.grad(beside)(theta), jax.grad(merged)(theta)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, want)


def test_other_rules_change_the_stack_itself():
  def apply(t, site, arrays):
    return {'kernel': arrays['kernel'] * t['scale']}

  def dot(t, x, y, w, key):
    raise AssertionError('the rule knows no tiles')

  rule = Weight('scaled', lambda key, site, arrays: {'scale': jnp.ones(())}, apply, dot)
  variables = {'params': {'maps': {'kernel': W}}}
  tuned = jpeft.attach(Tiles(), at('maps', rule), variables, X)
  theta = {'scaled': {'maps': {'scale': jnp.float32(2)}}}
  want = 2 * Tiles().apply(variables, X)
  np.testing.assert_allclose(tuned.apply(theta, variables, X), want, rtol=1e-5)


@pytest.mark.aot
def test_xla_for_a_tpu_multiplies_all_rows_by_all_matrices_of_a_ragged_dot():
  rows, width, hidden, experts = 4096, 1024, 3584, 8
  device = planning.target('tpu:v5e').devices[0]
  sharding = jax.sharding.SingleDeviceSharding(device)

  def spec(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  x, w = spec(rows, width), spec(experts, width, hidden)
  compiled = jax.jit(jax.lax.ragged_dot).lower(x, w, spec(experts, dtype=jnp.int32)).compile()
  of_rows = 2 * rows * width * hidden
  assert compiled.cost_analysis()['flops'] > 0.9 * experts * of_rows
