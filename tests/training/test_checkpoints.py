"""What is saved comes back bit for bit; what is half written or damaged does not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from jpeft.training.checkpoints import Checkpoints, fingerprint, load_theta, save_theta

TREE = {
  'theta': {
    'lora': {'encoder/q': {'a': jnp.arange(6.0).reshape(2, 3), 'b': jnp.ones(3, jnp.bfloat16)}}
  },
  'step': jnp.int32(7),
  'flags': jnp.array([True, False]),
}


def zeros():
  return jax.tree.map(jnp.zeros_like, TREE)


def test_round_trip(tmp_path):
  one = Checkpoints(tmp_path / 'c', keep=2)
  for step in (1, 2, 3):
    one.save(
      step,
      jax.tree.map(lambda x, step=step: x * step if x.dtype != bool else x, TREE),
      {'data': {'at': step}},
    )
  one.close()
  two = Checkpoints(tmp_path / 'c', keep=2)
  assert two.latest == 3 and {p.name for p in (tmp_path / 'c').iterdir()} == {'2', '3'}
  state, about = two.restore(zeros())
  assert about['data'] == {'at': 3}
  assert jax.tree.structure(state) == jax.tree.structure(TREE)
  for found, x in zip(jax.tree.leaves(state), jax.tree.leaves(TREE), strict=True):
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(found, x * 3 if x.dtype != bool else x)
  two.close()


def test_saving_copies_what_the_next_update_donates(tmp_path):
  checkpoints = Checkpoints(tmp_path / 'c', keep=1)
  x = jnp.zeros(1 << 20)
  bump = jax.jit(lambda x: x + 1, donate_argnums=0)
  for step in (1, 2):
    x = bump(x)
    checkpoints.save(step, {'x': x}, {})
    for _ in range(20):
      x = bump(x)
  state, _ = checkpoints.restore({'x': jnp.zeros(1 << 20)})
  assert set(np.unique(state['x'])) == {22.0}
  checkpoints.close()


def test_what_a_kill_left_half_written_is_ignored(tmp_path):
  checkpoints = Checkpoints(tmp_path / 'c', keep=2)
  checkpoints.save(4, TREE, {})
  checkpoints.close()
  half = tmp_path / 'c/5.orbax-checkpoint-tmp'
  half.mkdir()
  (half / 'state').write_text('half')
  again = Checkpoints(tmp_path / 'c', keep=2)
  assert again.latest == 4 and not half.exists()
  again.restore(zeros())
  again.close()


def test_what_a_kill_left_too_many_is_removed(tmp_path):
  """It came when the newest was written, and before the oldest was removed."""
  folder = tmp_path / 'c'
  more = Checkpoints(folder, keep=3)
  for step in (1, 2, 3):
    more.save(step, TREE, {})
  more.close()
  again = Checkpoints(folder, keep=2)
  assert len(list(folder.iterdir())) == 3  # the older ones, lest the newest cannot be read
  again.save(3, TREE, {})  # at the end, where the newest is there already
  again.wait()
  assert {path.name for path in folder.iterdir()} == {'2', '3'} and again.latest == 3


def test_a_checkpoint_of_something_else(tmp_path):
  checkpoints = Checkpoints(tmp_path / 'c', keep=2)
  checkpoints.save(1, TREE, {})
  checkpoints.wait()
  with pytest.raises(ValueError, match='another method or optimizer.*goes on from the start'):
    checkpoints.restore({**zeros(), 'more': jnp.zeros(2)})
  checkpoints.close()


def test_theta_file(tmp_path):
  theta = TREE['theta']
  save_theta(tmp_path / 'theta.safetensors', theta, step=3, accuracy=0.5)
  with safe_open(tmp_path / 'theta.safetensors', 'numpy') as file:
    assert set(file.keys()) == {'lora/encoder/q/a', 'lora/encoder/q/b'}
  back, about = load_theta(tmp_path / 'theta.safetensors', jax.eval_shape(lambda: theta))
  assert about == {'step': 3, 'accuracy': 0.5} and fingerprint(back) == fingerprint(theta)
  assert [p.name for p in tmp_path.iterdir()] == ['theta.safetensors']


def test_theta_of_another_method(tmp_path):
  save_theta(tmp_path / 't', TREE['theta'])
  with pytest.raises(
    ValueError, match='it lacks ssf/encoder/q/scale and has lora/encoder/q/a, lora'
  ):
    load_theta(tmp_path / 't', {'ssf': {'encoder/q': {'scale': jnp.ones(3)}}})
  with pytest.raises(ValueError, match=r'has the shape \(2, 3\), the model wants \(2, 4\)'):
    wide = {'lora': {'encoder/q': {'a': jnp.ones((2, 4)), 'b': jnp.ones(3)}}}
    load_theta(tmp_path / 't', wide)


def test_fingerprint_sees_bits_names_and_shapes():
  x = jnp.arange(4.0)
  others = [
    {'a': x.reshape(2, 2)},
    {'b': x},
    {'a': x.astype(jnp.bfloat16)},
    {'a': x.at[0].set(-0.0)},
  ]
  assert fingerprint({'a': x}) == fingerprint({'a': np.arange(4, dtype=np.float32)})
  assert len({fingerprint(t) for t in [{'a': x}, *others]}) == 5


def test_scalars_and_integers_of_theta_come_back(tmp_path):
  theta = {'m': {'fc': {'gate': jnp.ones(()), 'rows': jnp.arange(3), 'on': jnp.array(True)}}}
  save_theta(tmp_path / 't', theta)
  back, _ = load_theta(tmp_path / 't', jax.eval_shape(lambda: theta))
  chex.assert_trees_all_equal_shapes_and_dtypes(back, theta)
  chex.assert_trees_all_equal(back, theta)
  # Files written before had scalars as arrays of one number.
  save_theta(tmp_path / 'old', jax.tree.map(jnp.atleast_1d, theta))
  chex.assert_trees_all_equal(load_theta(tmp_path / 'old', jax.eval_shape(lambda: theta))[0], theta)
