"""VeLoRA: the worked example, what is exact, what is kept, and the direction."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.methods.memory.velora import directed, projected, velora
from tests.fixtures import BACKBONES, leaves_equal, noisy
from tests.params import fast_if

RNG = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)


def dense(groups, width=4, out=2, **hp):
  """(tuned, variables, theta) of a Dense layer whose kernel is trained."""
  model = nn.Dense(out)
  held = {'params': {'kernel': draw(width, out), 'bias': draw(out)}}
  tuned = jpeft.attach(model, velora(groups, targets='', **hp), held, jnp.zeros((1, width)))
  return tuned, held, jax.jit(tuned.init)(jax.random.key(0), held)


def at_direction(theta, v):
  return {'velora': {'': {**theta['velora'][''], 'direction': jnp.asarray(v, jnp.float32)}}}


def d_kernel(tuned, theta, held, x, g):
  return jax.vjp(lambda theta: tuned.apply(theta, held, x), theta)[1](g)[0]['velora']['']['kernel'][
    'w'
  ]


@pytest.mark.parametrize('scale', [1.0, 0.1])
def test_the_worked_example(scale):
  tuned, held, theta = dense(2, scale=scale)
  x, g = jnp.array([[1.0, 2, 3, 4]]), jnp.array([[1.0, -1]])
  near = np.array([1.32, 1.76, 3, 4])
  grad = d_kernel(tuned, at_direction(theta, [0.6, 0.8]), held, x, g)
  np.testing.assert_allclose(grad.T, scale * np.stack([near, -near]), rtol=1e-6)


def test_outputs_and_gradients_of_inputs_are_exact():
  tuned, held, theta = dense(4, 16, 3)
  x, g = draw(5, 7, 16), draw(5, 7, 3)
  y, vjp = jax.vjp(lambda x: tuned.apply(theta, held, x), x)
  want, exact = jax.vjp(lambda x: nn.Dense(3).apply(held, x), x)
  assert leaves_equal(y, want) and leaves_equal(vjp(g), exact(g))


def exact(x, g):
  return np.einsum('bnd,bno->do', x, g)


def test_one_group_a_channel_is_exact():
  tuned, held, theta = dense(16, 16, 3)
  x, g = draw(5, 7, 16), draw(5, 7, 3)
  np.testing.assert_allclose(
    d_kernel(tuned, at_direction(theta, [1.0]), held, x, g), exact(x, g), rtol=1e-4, atol=1e-4
  )


def test_inputs_along_the_direction_are_exact_and_others_are_projected():
  tuned, held, theta = dense(4, 16, 16)
  v = np.asarray(theta['velora']['']['direction'])
  np.testing.assert_allclose(np.linalg.norm(v), 1, rtol=1e-6)
  g = draw(5, 7, 16)
  x = (draw(5, 7, 4)[..., None] * v).reshape(5, 7, 16)
  np.testing.assert_allclose(d_kernel(tuned, theta, held, x, g), exact(x, g), rtol=1e-4, atol=1e-4)
  x, eye = draw(1, 1, 16), jnp.eye(16)[:1, None]
  rebuilt = np.asarray(d_kernel(tuned, theta, held, x, eye))[:, 0]  # x, by its gradient
  near = rebuilt.reshape(4, 4)
  groups = np.asarray(x).reshape(4, 4)
  np.testing.assert_allclose((near * (groups - near)).sum(-1), 0, atol=1e-5)
  assert (np.linalg.norm(near, axis=-1) <= np.linalg.norm(groups, axis=-1)).all()


def test_what_is_kept():
  tuned, held, theta = dense(4, 64, 8)
  x = draw(5, 7, 64)
  _, vjp = jax.vjp(lambda theta, x: tuned.apply(theta, held, x), theta, x)
  assert sum(a.size for a in jax.tree.leaves(vjp)) == 5 * 7 * 4 + 64 * 8 + 16


MAKE = {
  'velora': velora,
  'projected': lambda m: projected(jpeft.lora(2, targets='{v}|{fc2}', name='velora'), m),
}


@pytest.mark.parametrize(
  'name, method',
  fast_if(
    lambda name, method: (method == 'velora') == name.startswith('linen'),
    itertools.product(['linen_vit', 'linen_vit_scan', 'nnx_llama'], MAKE),
  ),
)
def test_the_direction_is_the_mean_of_the_first_batch_and_is_not_trained(name, method):
  b = BACKBONES[name]
  before = dict(jpeft.ANATOMIES)
  jpeft.register_anatomy(jpeft.Anatomy('fixture', dict(b.roles)))
  try:
    tuned = jpeft.attach(b.model, MAKE[method](4), b.backbone, *b.args, **b.kwargs)
  finally:
    jpeft.ANATOMIES.clear()
    jpeft.ANATOMIES.update(before)
  start = jax.jit(tuned.init)(jax.random.key(0), b.backbone)
  theta = directed(tuned, start, b.backbone, *b.args, **b.kwargs)

  def see(t, call, *args):
    x = next(iter(call.inputs(*args).values()))
    call.tap(x=x)
    return call(*args)

  def read(t, call, *args, **kwargs):
    call(*args, **kwargs)
    return call.taps()

  for path, t in theta['velora'].items():
    spies = (
      jpeft.at(where, jpeft.Call('see', fn, taps=True)) for where, fn in ((path, see), ('', read))
    )
    spied = jpeft.attach(b.model, jpeft.chain(*spies), b.backbone, *b.args, **b.kwargs)
    seen = spied.apply({}, b.backbone, *b.args, **b.kwargs)
    x = np.asarray(seen[path]['x'], np.float64)
    x = x if b.scanned else x[None]
    for layer, v in zip(x, np.asarray(t['direction']).reshape(len(x), -1), strict=True):
      mean = layer.reshape(-1, v.size).mean(0)
      np.testing.assert_allclose(v, mean / np.linalg.norm(mean), atol=1e-5)
  free = jax.tree_util.tree_leaves_with_path(tuned.trainable(theta))
  assert all(trained == ('direction' not in jax.tree_util.keystr(path)) for path, trained in free)


def test_it_composes_with_lora():
  """At one group a channel LoRA's own gradients; at fewer, another one for a alone."""
  model, x, g = nn.Dense(8), draw(3, 5, 64), draw(3, 5, 8)
  held = jax.jit(model.init)(jax.random.key(0), x)
  alone = jpeft.attach(model, jpeft.lora(2, targets=''), held, x)
  factors = noisy(alone.init(jax.random.key(1), held))['lora']['']

  def grads(tuned, **more):
    out, vjp = jax.vjp(lambda t: tuned.apply({'lora': {'': {**t, **more}}}, held, x), factors)
    return out, vjp(g)[0]['kernel']

  out, want = grads(alone)
  for groups in (64, 8):
    tuned = jpeft.attach(model, projected(jpeft.lora(2, targets=''), groups), held, x)
    same, near = grads(tuned, direction=jnp.ones(64 // groups) / np.sqrt(64 / groups))
    np.testing.assert_array_equal(same, out)
    np.testing.assert_allclose(near['b'], want['b'], rtol=1e-5)
    rows = np.asarray(x).reshape(15, groups, -1).mean(-1).repeat(64 // groups, -1)
    d_low = np.asarray(g).reshape(15, 8) @ np.asarray(factors['kernel']['b']).T
    np.testing.assert_allclose(near['a'], rows.T @ d_low * 8 / 2, rtol=1e-4, atol=1e-4)


def test_bad_hyperparameters_and_places():
  with pytest.raises(ValueError, match='groups=0 must be a whole number'):
    velora(0)
  with pytest.raises(
    ValueError,
    match="velora: '' must multiply one axis of its input, whose length groups=3 divides",
  ):
    dense(3)
  with pytest.raises(ValueError, match='houlsby does not multiply the input of a layer'):
    projected(jpeft.houlsby())
