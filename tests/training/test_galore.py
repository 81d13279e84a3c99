"""GaLore and Natural GaLore: a worked example, Adam in a rotated basis, sizes, natural steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jpeft
from jpeft import optim, programs
from jpeft.models import ViT
from jpeft.training.galore import natural, scale_by_galore, sketched
from tests.methods.golden import full_size
from tests.methods.small import IMAGES, vit

RNG = np.random.default_rng(0)


def stepped(tx, w, gradients, lr):
  """[(w, state) after each update]."""
  chain = optax.chain(tx, optax.scale(-lr))
  state = chain.init(w)
  found = []
  for g in gradients:
    updates, state = chain.update(g, state, w)
    w = optax.apply_updates(w, updates)
    found.append((w, state[0]))
  return found


def test_the_worked_example():
  w = jnp.array([[1.0, 2, 3], [4, 5, 6]])
  gradients = [jnp.array([[3.0, 0, 0], [0, 1, 0]]), jnp.array([[1.0, 1, 0], [0, 2, 1]])]
  (first, one), (second, two) = stepped(scale_by_galore(1, 2), w, gradients, 0.1)
  np.testing.assert_allclose(jnp.abs(one.basis), [[1], [0]], atol=1e-7)
  np.testing.assert_allclose(first[0], [0.9750003, 2, 3], atol=1e-6)
  np.testing.assert_allclose(jnp.abs(two.mean), [[0.37, 0.1, 0]], atol=1e-6)
  np.testing.assert_allclose(two.square, [[0.009991, 0.001, 0]], atol=1e-7)
  np.testing.assert_allclose(second[0], [0.9532239, 1.9813972, 3], atol=1e-6)
  np.testing.assert_array_equal(second[1], w[1])


@pytest.mark.parametrize('basis', ['svd', 'sketch'])
@pytest.mark.parametrize('shape', [(4, 6), (6, 4)])
def test_of_full_rank_it_is_adam_in_the_rotated_basis(shape, basis):
  w = jnp.asarray(RNG.normal(size=shape), jnp.float32)
  gradients = [jnp.asarray(RNG.normal(size=shape), jnp.float32) for _ in range(4)]
  rule = scale_by_galore(4, 100, scale=1.0, eps=1e-12, basis=basis)
  found = stepped(rule, w, gradients, 0.1)
  p = found[0][1].basis
  np.testing.assert_allclose(p @ p.T, np.eye(4), atol=1e-5)
  left = shape[0] < shape[1]
  there = (lambda x: p.T @ x) if left else (lambda x: x @ p)
  rotated = stepped(optax.scale_by_adam(eps=1e-12), there(w), map(there, gradients), 0.1)
  for (ours, _), (theirs, _) in zip(found, rotated, strict=True):
    np.testing.assert_allclose(there(ours), theirs, atol=1e-4)


@pytest.mark.parametrize(
  'side, basis, projected',
  [
    ('short', (4096, 128), (128, 11008)),
    ('left', (4096, 128), (128, 11008)),
    ('long', (11008, 128), (4096, 128)),
    ('right', (11008, 128), (4096, 128)),
  ],
)
def test_the_state_has_no_array_of_the_matrix(side, basis, projected):
  w = jax.ShapeDtypeStruct((4096, 11008), jnp.float32)
  state = jax.eval_shape(scale_by_galore(128, side=side).init, w)
  assert [x.shape for x in jax.tree.leaves(state)] == [(), basis, projected, projected]
  if side == 'short':
    assert sum(x.size for x in jax.tree.leaves(state)) - 1 == 3_342_336
    assert 2 * w.size == 90_177_536


def test_no_two_parts_of_the_state_share_memory():
  state = scale_by_galore(2, history=1).init(jnp.zeros((30, 40)))
  places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
  assert len(set(places)) == len(places) == 5


def test_the_natural_step_is_that_of_the_dense_system():
  with jax.enable_x64(True):
    history = jnp.asarray(RNG.normal(size=(5, 30)))
    dense = jnp.linalg.solve(1e-3 * jnp.eye(30) + history.T @ history, history[-1])
    np.testing.assert_allclose(natural(history, 1e-3), dense, atol=1e-9)
    # Woodbury's form, as the paper has it.
    small = jnp.eye(5) + history @ history.T / 1e-3
    z = jnp.linalg.solve(small, history @ history[-1])
    woodbury = history[-1] / 1e-3 - history.T @ z / 1e-3**2
    np.testing.assert_allclose(natural(history, 1e-3), woodbury, atol=1e-8)
    alone = jnp.array([[0.0, 0], [3, 4]])  # nothing came before
    np.testing.assert_allclose(natural(alone, 1e-3), [0.1199952, 0.1599936], atol=1e-7)


def test_the_natural_step_is_exact_in_float32():
  history = RNG.normal(size=(20, 300)).astype(np.float32) * 10
  found = natural(jnp.asarray(history), 1e-3)
  wide = history.astype(np.float64)
  expected = np.linalg.solve(wide @ wide.T + 1e-3 * np.eye(20), np.eye(20)[-1]) @ wide
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_the_history_is_of_the_last_gradients():
  w = jnp.zeros((8, 9))
  gradients = [jnp.asarray(RNG.normal(size=(8, 9)), jnp.float32) for _ in range(4)]
  found = stepped(scale_by_galore(2, 100, history=2), w, gradients, 0.1)
  basis = found[0][1].basis
  projected = [(basis.T @ g).reshape(-1) for g in gradients]
  np.testing.assert_allclose(found[-1][1].history, projected[2:], atol=1e-6)


def test_a_history_that_outweighs_adam_is_told():
  w = jnp.zeros((768, 768))
  with pytest.warns(UserWarning, match=r'of a matrix \[768, 768\], and Adam 1,179,648: history=9'):
    jax.eval_shape(scale_by_galore(128, history=20).init, w)
  with pytest.warns(UserWarning, match='take a lower rank'):
    jax.eval_shape(scale_by_galore(768, history=1).init, w)


@pytest.mark.parametrize('shape', [(120, 300), (300, 120), (20, 30)])
def test_a_sketch_finds_the_leading_vectors(shape):
  u, _ = np.linalg.qr(RNG.normal(size=(shape[0], min(shape))))
  v, _ = np.linalg.qr(RNG.normal(size=(shape[1], min(shape))))
  values = 1 / (1 + np.arange(min(shape)))  # a slow fall
  matrix = jnp.asarray((u * values) @ v.T, jnp.float32)
  found = np.asarray(sketched(matrix, 16, jax.random.key(3)))
  np.testing.assert_allclose(found.T @ found, np.eye(16), atol=1e-5)
  kept = np.sum(np.square(found.T @ matrix))
  assert kept >= 0.9999 * np.sum(np.square(values[:16]))
  np.testing.assert_allclose(np.abs(np.sum(found[:, :4] * u[:, :4], 0)), 1, atol=1e-3)  # in order


def test_a_sketch_of_nothing_is_finite():
  found = sketched(jnp.zeros((12, 20)), 4, jax.random.key(0))
  np.testing.assert_allclose(found.T @ found, np.eye(4), atol=1e-5)


def test_sketched_directions_are_nearly_those_of_the_svd():
  w = jnp.zeros((40, 60))
  low = RNG.normal(size=(40, 6)) @ RNG.normal(size=(6, 60))
  gradients = [jnp.asarray(low + 1e-3 * RNG.normal(size=w.shape), jnp.float32) for _ in range(3)]
  found = [
    stepped(scale_by_galore(6, 100, basis=b), w, gradients, 0.1)[-1][0] for b in ('svd', 'sketch')
  ]
  np.testing.assert_allclose(*found, atol=1e-4)


def test_the_basis_is_refreshed_each_so_many_updates():
  w = jnp.zeros((3, 4))
  gradients = [jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32) for _ in range(7)]
  bases = [state.basis for _, state in stepped(scale_by_galore(2, 3), w, gradients, 0.1)]
  changed = [bool(jnp.any(a != b)) for a, b in zip(bases[:-1], bases[1:], strict=True)]
  assert changed == [False, False, True, False, False, True]


def trained(tuned, variables, tx, steps=3):
  theta = tuned.init(jax.random.key(0), variables)
  state = tx.init(theta)
  loss = lambda theta: jnp.sum(jnp.sin(tuned.apply(theta, variables, IMAGES)))

  @jax.jit
  def update(theta, state):
    updates, state = tx.update(jax.grad(loss)(theta), state, theta)
    return optax.apply_updates(theta, updates), state

  for _ in range(steps):
    theta, state = update(theta, state)
  return theta


def test_what_is_no_chosen_matrix_follows_adam():
  model, variables = vit()
  tuned = jpeft.attach(model, jpeft.full(), variables, IMAGES)
  rate = optax.constant_schedule(1e-3)
  rule = dict(rank=4, every=2, matrices='full/.*/mlp/.*', eps=1e-6, weight_decay=0.1)
  ours = optim.optimizer(tuned, tuned.shapes, rate, name='galore', **rule)
  one = trained(tuned, variables, ours, steps=1)['full']
  adam = optim.optimizer(tuned, tuned.shapes, rate, eps=1e-6, weight_decay=0.1)
  other = trained(tuned, variables, adam, steps=1)['full']
  for path, entries in one.items():
    for name, x in entries.items():
      same = np.allclose(x, other[path][name], atol=1e-7)
      assert same != ('mlp' in path and name == 'kernel'), (path, name)


def vit_base():
  shapes = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
  model = jpeft.models.ViT(
    width=768, depth=12, heads=12, mlp_dim=3072, patch_size=16, num_classes=10, scan=True
  )
  return full_size.of(model, shapes)


def state_bytes(tuned, name, **options):
  tx = optim.optimizer(tuned, tuned.shapes, optax.constant_schedule(1e-3), name=name, **options)
  return programs.nbytes(jax.eval_shape(tx.init, tuned.shapes))


def test_the_state_on_vit_base_is_a_quarter_of_adams():
  base = vit_base()
  tuned = jpeft.attach(base.model, jpeft.full(), *base.shapes)
  adam = state_bytes(tuned, 'adamw')
  assert adam / 2**20 == pytest.approx(655, abs=1)
  assert state_bytes(tuned, 'galore', rank=128) <= 0.25 * adam
  with pytest.warns(UserWarning, match='natural GaLore keeps'):
    assert state_bytes(tuned, 'natural_galore', rank=128, history=20) > adam


@pytest.mark.parametrize('name', ['galore', 'natural_galore', 'muon'])
def test_the_rules_by_name_train_a_scanned_model(name):
  model, variables = vit(scan=True)
  tuned = jpeft.attach(model, jpeft.full(), variables, IMAGES)
  options = {} if name == 'muon' else {'rank': 4, 'every': 2}
  if name == 'natural_galore':  # of small matrices two gradients outweigh Adam
    options |= {'history': 2, 'matrices': 'full/.*/mlp/.*'}
  rate = optax.constant_schedule(1e-2)
  tx = optim.optimizer(tuned, tuned.shapes, rate, name=name, **options)
  start = tuned.init(jax.random.key(0), variables)
  loss = lambda theta: jnp.sum(jnp.sin(tuned.apply(theta, variables, IMAGES)))
  assert loss(trained(tuned, variables, tx)) < loss(start)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'rank': 0}, 'galore: rank=0 must be a whole number, at least 1'),
    ({'every': 1.5}, 'galore: every=1.5 must be a whole number'),
    ({'history': 0}, 'galore: history=0 must be a whole number'),
    ({'side': 'top'}, "galore: side='top' is none of short, long, left, right"),
    ({'basis': 'qr'}, "galore: basis='qr' is none of svd, sketch"),
  ],
)
def test_arguments_are_checked(arguments, message):
  with pytest.raises(ValueError, match=message):
    scale_by_galore(**arguments)


@pytest.mark.slow
def test_gradients_go_as_their_kernels_are_updated():
  """Unrolled, unless the norm of all of them is asked for: then a whole set exists at once."""
  model = ViT(128, 8, heads=4, mlp_dim=512, patch_size=8, image_size=16, num_classes=5)
  x = jnp.zeros((1, 16, 16, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  tuned = jpeft.attach(model, jpeft.full(), shapes, x)
  chosen = 'full/.*/(attention|mlp)/.*'
  galore = optim.on_matrices(tuned, scale_by_galore(8, 200), optax.scale_by_adam(), chosen)

  def needed(*before) -> int:
    """The bytes beside weights and state."""
    tx = optax.chain(*before, galore, optax.scale(-1e-3))

    def step(theta, state, backbone, x):
      grads = jax.grad(lambda t: jnp.square(tuned.apply(t, backbone, x)).mean())(theta)
      updates, state = tx.update(grads, state, theta)
      return optax.apply_updates(theta, updates), state

    state = jax.eval_shape(tx.init, tuned.shapes)
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(tuned.shapes, state, shapes, x)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  kernels = 8 * (4 * 128 * 128 + 2 * 128 * 512) * 4
  saved = needed(optax.clip_by_global_norm(1.0)) - needed()
  assert 0.75 * kernels < saved < 1.1 * kernels
