"""LoftQ: what LoRA starts at, what is stored in 4 bits, peft's own code, a run, refusals."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import adapter, cli, config, merge, training
from jpeft.methods.weight.loftq import factors_of
from tests.methods.small import IMAGES, vit

LOFTQ = functools.partial(jpeft.lora, 4, 8, init='loftq')
FC1 = 'encoder/block_0/mlp/fc1'


@functools.cache
def started(iterations=1, scan=False):
  """(model, whole weights, method after its pass, the weights in 4 bits, tuned, theta)."""
  model, held = vit(scan=scan)
  method = LOFTQ(targets='{fc1}|{q}', iterations=iterations)
  batches = [(IMAGES, np.arange(2))]
  method = jpeft.prepare(method, model, held, batches, storage=jpeft.nf4())
  stored = jpeft.to_store(method, model, held, IMAGES)
  boxed = jpeft.quantize(model, jpeft.nf4(), stored, IMAGES)
  tuned = jpeft.attach(model, method, boxed, IMAGES)
  return model, held, method, boxed, tuned, jax.jit(tuned.init)(jax.random.key(0), boxed)


def kernel(variables, path):
  x = functools.reduce(lambda tree, key: tree[key], path.split('/'), variables['params'])['kernel']
  return np.asarray(x.unbox() if isinstance(x, jpeft.Box) else x)


def left(iterations):
  """What is lost of a kernel, as a share of what 4 bits alone lose."""
  model, held, _, boxed, _, theta = started(iterations)
  w = kernel(held, FC1)
  t = theta['lora'][FC1]['kernel']
  lost = np.linalg.norm(w - kernel(boxed, FC1) - 2.0 * (t['a'] @ t['b']))
  plain = kernel(jpeft.quantize(model, jpeft.nf4(), held, IMAGES), FC1)
  return lost / np.linalg.norm(w - plain)


def test_one_iteration_is_the_largest_part_of_what_is_lost():
  model, held, method, boxed, _, theta = started()
  plain = jpeft.quantize(model, jpeft.nf4(), held, IMAGES)
  jax.tree.map(np.testing.assert_array_equal, boxed, plain)  # the kernels that are stored anyway
  rest = kernel(held, FC1) - kernel(boxed, FC1)
  u, s, vt = np.linalg.svd(rest, full_matrices=False)
  t = theta['lora'][FC1]['kernel']
  np.testing.assert_allclose(2.0 * (t['a'] @ t['b']), (u[:, :4] * s[:4]) @ vt[:4], atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(t['a']), np.linalg.norm(t['b']), rtol=1e-4)
  found = jpeft.found_in(method)
  assert not any('before' in key for key in found)
  first, last = found['lora/errors']
  assert last < first and jpeft.core.unprepared(method) == []


def test_iterations_come_nearer():
  """Which the model as it is stored shows, not what the pass says."""
  shares = [left(iterations) for iterations in (1, 5)]
  assert shares[1] < shares[0] < 0.9
  _, held, method, boxed, tuned, theta = started(5)
  merged = jax.jit(tuned.merge)(theta, boxed)
  squares = 0
  for path in theta['lora']:
    squares += np.square(kernel(merged, path) - kernel(held, path)).sum()
  np.testing.assert_allclose(np.sqrt(squares), jpeft.found_in(method)['lora/errors'][1], rtol=1e-4)


def test_a_stack_starts_layer_by_layer():
  _, held, _, boxed, tuned, theta = started(2, scan=True)
  path = 'encoder/blocks/mlp/fc1'
  t = theta['lora'][path]['kernel']
  for layer in range(3):
    rest = kernel(held, path)[layer] - kernel(boxed, path)[layer]
    a, b = factors_of(jnp.asarray(rest), 4, 2.0)
    np.testing.assert_allclose(t['a'][layer] @ t['b'][layer], a @ b, atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize('iterations', [1, 3])
def test_it_is_that_of_peft(iterations):
  """peft's own loop, which asks for a GPU by name, on the CPU; there s is 1."""
  torch = pytest.importorskip('torch')
  peft = pytest.importorskip('peft.utils.loftq_utils')
  pytest.importorskip('bitsandbytes')
  code = peft.loftq_init.__wrapped__.__code__
  consts = tuple('cpu' if x == 'cuda' else x for x in code.co_consts)
  theirs = types.FunctionType(code.replace(co_consts=consts), vars(peft))

  # bitsandbytes on a CPU decodes blocks that cross rows wrongly: a row is a whole block.
  model, held = vit(width=64, mlp_dim=128)
  method = jpeft.lora(4, 4, targets='{fc1}', init='loftq', iterations=iterations)
  batches = [(IMAGES, np.arange(2))]
  method = jpeft.prepare(method, model, held, batches, storage=jpeft.nf4())
  stored = jpeft.to_store(method, model, held, IMAGES)
  boxed = jpeft.quantize(model, jpeft.nf4(), stored, IMAGES)
  found = jpeft.found_in(method)
  w = torch.tensor(kernel(held, FC1).T.copy())
  with torch.no_grad():
    coded, a, b = theirs(w, num_bits=4, reduced_rank=4, num_iter=iterations)
  np.testing.assert_allclose(kernel(boxed, FC1), coded.numpy().T, atol=1e-6)
  own = found[f'lora/a {FC1} kernel'][0] @ found[f'lora/b {FC1} kernel'][0]
  np.testing.assert_allclose(own, (b @ a).numpy().T, atol=1e-5)


def test_a_run_stores_starts_and_is_opened_again(config_file, tmp_path, capsys):
  flags = {'method.init': 'loftq', 'method.iterations': '2', 'method.rank': '2', 'steps': '2'}
  with pytest.raises(cli.Mistake, match="init='loftq' starts at what kernels lose in 4 bits, and"):
    training.train(config.load(f'{config_file}:lora', flags), tmp_path / 'whole')
  flags |= {'model.quantize': 'nf4', 'optimizer.lr': '1e-9'}
  folder = tmp_path / 'run'
  report = training.train(config.load(f'{config_file}:lora', flags), folder)
  pretrained, tuned, theta = training.reopen(folder)
  assert report['storage'] == 'nf4' and report['backbone_bytes'] == jpeft.nbytes(
    pretrained.variables
  )
  # What is stored, with what training starts from, is near the kernels as they were loaded.
  settings = config.load(f'{config_file}:lora', {})
  plain, _ = training.build(settings, 2)
  merged = jax.jit(tuned.merge)(theta, pretrained.variables)
  path = 'encoder/block_0/attention/query'
  w = kernel(plain.variables, path)
  assert np.linalg.norm(kernel(merged, path) - w) < 0.9 * np.linalg.norm(
    kernel(pretrained.variables, path) - w
  )
  capsys.readouterr()
  assert merge.main(['--run', str(folder), '--out', str(tmp_path / 'merged')]) == 0
  with pytest.raises(cli.Mistake, match='are not those of the base model'):
    adapter.main(['--run', str(folder), '--out', str(tmp_path / 'adapter')])


def test_refusals():
  model, held = vit()
  batches = [(IMAGES, np.arange(2))]
  prepare = functools.partial(jpeft.prepare, model=model, backbone=held, batches=batches)
  with pytest.raises(ValueError, match="init='loftq' starts at what kernels lose in 4 bits, and"):
    prepare(LOFTQ())
  for targets in ('{head}', '{patch}'):
    with pytest.raises(ValueError, match="those of {linear}, and '.*kernel' is none"):
      prepare(LOFTQ(targets=targets), storage=jpeft.nf4())
  with pytest.raises(ValueError, match=r'at most rank 32 out of a matrix \[32, 32\], not 33'):
    prepare(jpeft.lora(33, init='loftq'), storage=jpeft.nf4())
  boxed = jpeft.quantize(model, jpeft.nf4(), held, IMAGES)
  with pytest.raises(ValueError, match='is stored as Quantized already: quantize the backbone aft'):
    jpeft.prepare(LOFTQ(), model, boxed, batches, storage=jpeft.nf4())
  with pytest.raises(ValueError, match="iterations=2 is of init='loftq', and init is 'pissa'"):
    jpeft.lora(init='pissa', iterations=2)
  with pytest.raises(ValueError, match='iterations=0 must be a whole number, at least 1'):
    jpeft.lora(init='loftq', iterations=0)
  with pytest.raises(ValueError, match="init='loftq' needs both factors trained"):
    jpeft.lora_fa(init='loftq')
