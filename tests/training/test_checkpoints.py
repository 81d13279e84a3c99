"""What is saved comes back bit for bit; what is half written or damaged does not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open

from jpeft.training import mesh, pieces
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


# ---- In pieces.


def cut_state(data, model):
  """Arrays that are cut in several ways over a mesh, whole, and of one number."""
  state = {
    'a': jnp.arange(16 * 12.0).reshape(16, 12),
    'b': jnp.arange(24, dtype=jnp.bfloat16).reshape(2, 12),
    'flags': jnp.arange(8) % 3 == 0,
    'step': jnp.int32(7),
  }
  specs = {'a': ('data', 'model'), 'b': (None, 'model'), 'flags': ('data',), 'step': ()}
  where = {
    name: NamedSharding(mesh(data, model), PartitionSpec(*spec)) for name, spec in specs.items()
  }
  return jax.device_put(state, where)


def written(folder, state, step=3):
  """Checkpoints with one in pieces, by this process alone."""
  checkpoints = Checkpoints(folder, keep=1)
  pieces.begun(folder, step)
  pieces.write(folder, step, 0, jax.tree.leaves(state))
  checkpoints.finish_pieces(step, state, {'seconds': 2.0}, 1)
  return checkpoints


def test_pieces_are_read_by_any_devices(tmp_path):
  state = cut_state(4, 2)
  checkpoints = written(tmp_path / 'c', state)
  assert {file.name for file in (tmp_path / 'c/3').iterdir()} == {'0.bin', 'about.json'}
  like = cut_state(2, 2)
  found, about = checkpoints.restore(like)
  assert about['seconds'] == 2.0
  listed = pieces.about_of(tmp_path / 'c/3')
  placed = pieces.Pieces(tmp_path / 'c/3', listed, jax.tree.leaves(like)).placed()
  for x, y, old, there in zip(*map(jax.tree.leaves, (found, placed, state, like)), strict=True):
    assert x.sharding == y.sharding == there.sharding
    np.testing.assert_array_equal(x, old)
    np.testing.assert_array_equal(y, old)
  checkpoints.close()


def test_pieces_take_the_place_of_older_checkpoints(tmp_path):
  state = cut_state(4, 2)
  checkpoints = written(tmp_path / 'c', state)
  for step in (5, 7):
    if step == 5:
      checkpoints.save(5, state, {})
      checkpoints.wait()
    else:
      pieces.begun(tmp_path / 'c', 7)
      pieces.write(tmp_path / 'c', 7, 0, jax.tree.leaves(state))
      checkpoints.finish_pieces(7, state, {}, 1)
    assert checkpoints.latest == step
    assert [path.name for path in (tmp_path / 'c').iterdir()] == [str(step)]
  checkpoints.close()


@pytest.mark.parametrize('what', ['changed', 'shorter', 'gone', 'list', 'half written'])
def test_pieces_that_are_damaged_are_set_aside(tmp_path, what):
  folder = tmp_path / 'run' / 'c'
  state = cut_state(4, 2)
  written(folder, state).close()
  file = folder / '3/0.bin'
  data = file.read_bytes()
  if what == 'changed':
    file.write_bytes(data[:40] + b'?' + data[41:])
  elif what == 'shorter':
    file.write_bytes(data[:-1])
  elif what == 'gone':
    file.unlink()
  elif what == 'list':
    about = folder / '3/about.json'
    about.write_text(about.read_text().replace('"parts": [[0', '"parts": [[9', 1))
  else:
    (folder / '3').rename(folder / '3.tmp')  # killed before it got its name
  checkpoints = Checkpoints(folder, keep=1)
  told = []
  assert checkpoints.newest(lambda _: state, told.append, whole=False) is None
  if what == 'half written':
    assert not told and not list(folder.iterdir())
  else:
    assert len(told) == 1 and 'cannot be read' in told[0]
    assert (tmp_path / 'run/damaged/3').is_dir()
  checkpoints.close()


def test_pieces_of_a_process_that_are_missing_are_told(tmp_path):
  checkpoints = Checkpoints(tmp_path / 'c', keep=1)
  state = cut_state(4, 2)
  pieces.begun(tmp_path / 'c', 3)
  pieces.write(tmp_path / 'c', 3, 0, jax.tree.leaves(state))
  with pytest.raises(ValueError, match='what process 1 has written of a checkpoint is not in'):
    checkpoints.finish_pieces(3, state, {}, 2)
  assert checkpoints.latest is None
  checkpoints.close()
