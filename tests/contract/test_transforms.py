"""vmap over thetas, rematerialisation and a mesh of devices give the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
from tests.contract.pair import far
from tests.contract.table import one_each, over

EACH = one_each()


@over(EACH, always=EACH[::8])
def test_vmap_over_thetas_and_checkpoint(pair):
  theta, out, grads = pair.moved
  floats, args = pair.start['backbone'], pair.b.args

  def both(theta, floats, args):
    thetas = jax.tree.map(lambda a, b: jnp.stack([a, b]), pair.theta, theta)
    outs = jax.vmap(pair.apply, (0, None, None))(thetas, floats, args)
    _, again = pair.gradient(jpeft.join(theta, floats), args, wrap=jax.checkpoint)
    return outs, again['theta']

  outs, again = jax.jit(both)(theta, floats, args)
  assert far(outs, jax.tree.map(lambda a, b: np.stack([a, b]), pair.trained[0], out)) < 1e-5
  assert far(again, grads['theta']) < 1e-4


@over(EACH, always=EACH[4::8])
def test_two_by_four_devices(pair):
  theta, out, grads = pair.moved
  mesh = jax.make_mesh((2, 4), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def sharded(x):
    wide = x.ndim > 1 and x.shape[-1] % 4 == 0
    return jax.device_put(
      x, NamedSharding(mesh, P(*[None] * (x.ndim - 1), 'model') if wide else P())
    )

  args = jax.device_put(pair.b.args, NamedSharding(mesh, P('data')))
  held = jpeft.join(
    jax.device_put(theta, NamedSharding(mesh, P())), [sharded(x) for x in pair.start['backbone']]
  )
  y, g = jax.jit(pair.gradient)(held, args)
  assert any('model' in x.sharding.spec for x in held['backbone'])
  assert len(jax.tree.leaves(y)[0].sharding.device_set) == 8
  assert far(y, out) < 1e-5
  assert far(g['theta'], grads['theta']) < 1e-4
