"""LoRAM: what is cut, the narrow model, recovery, full-size counts, runs, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft import adapter, cli, config, merge, models, predict, training
from jpeft.methods.weight.cuttable import LINEAR
from jpeft.methods.weight.loram import importances, least, loram
from jpeft.models import Llama
from jpeft.models.narrow.plan import plan_of
from tests.fixtures import noisy
from tests.methods.small import shapes_of
from tests.models.goldens import GOLDEN, close, golden

TOKENS = np.arange(12).reshape(2, 6).astype('int32')
HP = {'rank': 2, 'ratio': 0.5, 'skip_first': 1, 'skip_last': 1, 'by': 'random'}
# {name: (layers, words, numbers)} of the models of 64 query heads and 8 key heads in the paper.
LARGE = {'llama-3.1-70b': (128_256, 70_553_706_496), 'llama-2-70b': (32_000, 68_976_648_192)}


@functools.cache
def llama(scan=False):
  """(model of grouped queries, three blocks; weights)."""
  model = Llama(16, 3, 4, 16, 20, kv_heads=2, scan=scan)
  return model, noisy(jax.jit(model.init)(jax.random.key(0), TOKENS), 0.05)


def prepared(model, held, **hyperparameters):
  """The method after its pass, whose loss is the mean square of the logits."""

  def loss(out, labels):
    return jnp.square(out).mean()

  batches = [(TOKENS, TOKENS), (TOKENS + 3, TOKENS)]
  method = loram(**HP | hyperparameters)
  return jpeft.prepare(method, model, held, batches, loss=loss, key=jax.random.key(1))


@functools.cache
def narrow(scan=False):
  """(`Pruned`, its method attached, a theta off its start)."""
  model, held = llama(scan)
  small = jpeft.pruned(prepared(model, held), model, held, TOKENS)
  tuned = jpeft.attach(small.model, small.method, small.backbone, TOKENS)
  return small, tuned, noisy(jax.jit(tuned.init)(jax.random.key(0), small.backbone))


@functools.cache
def large(name, **hyperparameters):
  """(model of full size, its shapes, `Pruned` by the sizes that a plan goes by)."""
  words, _ = LARGE[name]
  model = Llama(8192, 80, 64, 28672, words, kv_heads=8, head='text', scan=True)
  shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  sites = jpeft.sites_of(model, shapes, TOKENS)
  method = jpeft.core.with_sizes(loram(**hyperparameters), sites)
  return model, shapes, jpeft.pruned(method, model, shapes, TOKENS)


def test_the_least_parts_go():
  scores = np.array([[0.3, 0.2, 0.9, 0.1, 0.2], [5, 4, 3, 2, 1.0]])
  gone = least(scores, 0.5)
  assert gone.tolist() == [[False, True, False, True, False], [False, False, False, True, True]]
  assert not least(scores, 0).any() and least(np.ones(10), 0.7).sum() == 7
  assert least(np.ones(8), 0.99).sum() == 7  # never all


def test_importance_is_of_single_numbers():
  """|w dw| of each number, summed over a part, against the gradients of the whole model."""
  model, held = llama()

  def loss(out, labels):
    return jnp.square(out).mean()

  batches = [jpeft.core.Examples((TOKENS,), TOKENS), jpeft.core.Examples((TOKENS + 3,), TOKENS)]
  found = importances('loram', jpeft.core.Pass(model, held, batches, loss=loss))

  def both(held):
    return sum(loss(model.apply(held, x), None) for x in (TOKENS, TOKENS + 3))

  grads = jax.jit(jax.grad(both))(held)
  size = jax.tree.map(lambda w, g: np.abs(w * g), held, grads)
  block = size['params']['decoder']['block_1']
  heads, units = 0, 0
  for name, owner in block['attention'].items():
    x = np.asarray(owner['kernel'])
    x = x.reshape(2, -1) if name == 'out' else np.moveaxis(x.reshape(16, 2, -1), 1, 0)
    heads = heads + x.reshape(2, -1).sum(1)
  for name, owner in block['mlp'].items():
    units = units + np.asarray(owner['kernel']).sum(1 if name == 'fc2' else 0)
  assert heads.shape == (2,) and units.shape == (16,)
  got = found['decoder/block_1/attention/out'], found['decoder/block_1/mlp/fc2']
  np.testing.assert_allclose(got[0][0], heads, rtol=1e-4)
  np.testing.assert_allclose(got[1][0], units, rtol=1e-4)


def test_factors_are_put_back_and_zeros_are_elsewhere():
  model, held = llama(scan=True)
  small, _, own = narrow(scan=True)
  whole, theta = jpeft.recovered(small, model, held, own, TOKENS)
  plain = jpeft.attach(model, jpeft.lora(2, 16, LINEAR, name='loram'), held, TOKENS)
  assert jax.tree.map(jnp.shape, theta) == jax.tree.map(jnp.shape, plain.shapes)
  assert sum(np.count_nonzero(x) for x in jax.tree.leaves(theta)) == jpeft.count(own)
  back = jpeft.narrowed_theta(model, small.keep, theta, jax.tree.map(jnp.asarray, own))
  jax.tree.map(np.testing.assert_array_equal, back, own)
  assert whole.method == jpeft.core.whole_of(small.method)


@pytest.mark.parametrize('scan', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_update_is_that_of_the_narrow_model_and_0_elsewhere(scan):
  model, held = llama(scan)
  small, tuned, own = narrow(scan)
  whole, theta = jpeft.recovered(small, model, held, own, TOKENS)
  zeros = jax.tree.map(jnp.zeros_like, held)
  moved = jax.jit(whole.merge)(theta, zeros)
  in_narrow = jax.jit(tuned.merge)(own, jax.tree.map(jnp.zeros_like, small.backbone))
  _, cut = jpeft.narrowed(model, moved, small.keep)
  check = functools.partial(np.testing.assert_allclose, atol=1e-6)
  jax.tree.map(check, cut, in_narrow)
  count = sum(np.count_nonzero(x) for x in jax.tree.leaves(moved))
  assert count == sum(np.count_nonzero(x) for x in jax.tree.leaves(in_narrow)) > 0


def test_a_ratio_of_0_is_lora():
  model, held = llama()
  small = jpeft.pruned(prepared(model, held, ratio=0.0), model, held, TOKENS)
  plain = jpeft.attach(model, jpeft.lora(2, 16, LINEAR, name='loram'), held, TOKENS)
  tuned = jpeft.attach(small.model, small.method, small.backbone, TOKENS)
  assert small.model == model
  jax.tree.map(np.testing.assert_array_equal, small.backbone, held)
  thetas = [noisy(jax.jit(t.init)(jax.random.key(0), held)) for t in (tuned, plain)]
  jax.tree.map(np.testing.assert_array_equal, *thetas)

  def gradient(tuned, theta):
    return jax.jit(jax.grad(lambda t: jnp.square(tuned.apply(t, held, TOKENS)).mean()))(theta)

  grads = [gradient(t, theta) for t, theta in zip((tuned, plain), thetas, strict=True)]
  jax.tree.map(np.testing.assert_array_equal, *grads)
  _, theta = jpeft.recovered(small, model, held, thetas[0], TOKENS)
  jax.tree.map(np.testing.assert_array_equal, theta, thetas[0])


def test_the_narrow_model_is_the_whole_one_with_zeros():
  model, held = llama()
  small, tuned, own = narrow()
  start = jax.tree.map(jnp.zeros_like, own)
  zeroed = jax.tree.map(jnp.copy, held)
  for number in range(3):
    block = zeroed['params']['decoder'][f'block_{number}']
    heads, units = (getattr(small.keep, f).get(number) for f in ('heads', 'mlp'))
    if heads is not None:
      out = np.array(block['attention']['out']['kernel'])
      out.reshape(2, -1)[np.setdiff1d(range(2), heads)] = 0
      block['attention']['out']['kernel'] = out
      fc2 = np.array(block['mlp']['fc2']['kernel'])
      fc2[np.setdiff1d(range(16), units)] = 0
      block['mlp']['fc2']['kernel'] = fc2
  expected = jax.jit(model.apply)(zeroed, TOKENS)
  out = jax.jit(tuned.apply)(start, small.backbone, TOKENS)
  np.testing.assert_allclose(out, expected, atol=1e-5)
  assert np.abs(expected - jax.jit(model.apply)(held, TOKENS)).max() > 1e-3

  # Without `pruned` the method multiplies by these zeros.
  masked = jpeft.attach(model, prepared(model, held), held, TOKENS)
  theta = jax.jit(masked.init)(jax.random.key(0), held)
  np.testing.assert_allclose(jax.jit(masked.apply)(theta, held, TOKENS), expected, atol=1e-5)
  # With b = 0 what is recovered is the whole model.
  whole, theta = jpeft.recovered(small, model, held, start, TOKENS)
  out = jax.jit(whole.apply)(theta, held, TOKENS)
  np.testing.assert_array_equal(out, jax.jit(model.apply)(held, TOKENS))


def test_a_key_head_goes_with_its_group():
  words, _ = LARGE['llama-3.1-70b']
  model = Llama(8192, 1, 64, 28672, words, kv_heads=8)
  sources = plan_of(model, jpeft.Keep(heads={0: (1,)})).sources
  outs = {name: sources[f'decoder/block_0/attention/{name}'][0].outs for name in ('query', 'key')}
  np.testing.assert_array_equal(outs['key'], np.arange(128, 256))
  np.testing.assert_array_equal(outs['query'], np.arange(1024, 2048))
  (o,) = sources['decoder/block_0/attention/out']
  np.testing.assert_array_equal(o.ins, np.arange(1024, 2048))


@pytest.mark.slow  # each traces 80 layers
@pytest.mark.parametrize(('name', 'reduction'), [('llama-3.1-70b', 15.81), ('llama-2-70b', 16.95)])
def test_storage_of_the_models_of_the_paper(name, reduction):
  """The numbers of the abstract, which counts 4 bits for each number that stays."""
  _, shapes, small = large(name)
  before, after = jpeft.count(shapes), jpeft.count(small.backbone)
  assert before == LARGE[name][1]
  assert round(before * 16 / (after * 4), 2) == reduction
  # Layers 4 to 77 alone are cut: 2 of 8 key heads and 4,301 of 28,672 hidden units stay.
  assert list(small.keep.heads) == list(small.keep.mlp) == list(range(4, 78))
  assert {len(x) for x in small.keep.heads.values()} == {2}
  assert {len(x) for x in small.keep.mlp.values()} == {4301}


@pytest.mark.slow
def test_layers_at_both_ends_are_whole():
  model, shapes, small = large('llama-3.1-70b')
  wide = shapes['params']['decoder']['blocks']['mlp']['fc2']['kernel'].shape[1:]
  blocks = small.backbone['params']['decoder']
  for number in (0, 3, 78, 79):
    assert blocks[f'block_{number}']['mlp']['fc2']['kernel'].shape == wide
  assert blocks['block_4']['mlp']['fc2']['kernel'].shape == (4301, wide[1])
  assert blocks['block_77']['mlp']['fc2']['kernel'].shape == (4301, wide[1])


def test_kernels_of_the_narrow_model_in_4_bits():
  _, _, small = large('llama-3.1-70b', skip_first=0, skip_last=0)
  code = functools.partial(jpeft.quantize, small.model, jpeft.nf4(double=True))
  coded = jax.eval_shape(lambda held: code(held, TOKENS), small.backbone)
  fc2 = 'params', 'decoder', 'blocks', 'mlp', 'fc2', 'kernel'
  boxed, plain = (functools.reduce(lambda x, key: x[key], fc2, t) for t in (coded, small.backbone))
  assert jpeft.nbytes(boxed) / plain.size == pytest.approx(0.516, abs=4e-3)
  own = coded['params']['decoder']['blocks'], small.backbone['params']['decoder']['blocks']
  assert jpeft.nbytes(own[0]) / jpeft.count(own[1]) == pytest.approx(0.52, abs=4e-3)


def test_lora_of_the_full_model_has_the_published_count():
  model = large('llama-3.1-70b', skip_first=0, skip_last=0)[0]
  tuned = shapes_of(model, jpeft.stand_in(loram()), TOKENS)
  per_layer = 2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)
  assert jpeft.summary(tuned).trainable == 80 * 8 * per_layer


@pytest.mark.parity
@pytest.mark.filterwarnings('ignore')  # of peft, which calls what transformers will rename
def test_peft_opens_what_is_recovered(tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  peft = pytest.importorskip('peft')
  base = models.load(GOLDEN / 'llama')
  words = golden('llama')[0]['tokens']
  method = loram(2, 4, ratio=0.5, skip_first=0, skip_last=1, by='random')
  method = jpeft.prepare(method, base.model, base.variables, [(words, words)])
  small = jpeft.pruned(method, base.model, base.variables, words)
  tuned = jpeft.attach(small.model, small.method, small.backbone, words)
  own = noisy(jax.jit(tuned.init)(jax.random.key(0), small.backbone))
  whole, theta = jpeft.recovered(small, base.model, base.variables, own, words)
  jpeft.save_adapter(tmp_path, base, theta, tuned=whole)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / 'llama').eval()
  plain = theirs(torch.tensor(np.asarray(words, 'int64'))).logits.detach().numpy()
  theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
  got = theirs(torch.tensor(np.asarray(words, 'int64'))).logits.detach().numpy()
  expected = jax.jit(whole.apply)(theta, base.variables, words)
  close(np.asarray(expected), got, 1e-5)
  assert np.abs(got - plain).max() > 1e-2


# Runs.

FLAGS = {
  'method.rank': 2,
  'method.ratio': 0.5,
  'method.skip_first': 1,
  'method.skip_last': 0,
  'method.batches': 2,
}


@pytest.fixture(
  scope='module', params=[pytest.param('plain', marks=pytest.mark.slow), 'nf4_double']
)
def run(request, config_file, tmp_path_factory):
  """(folder of a run, what it reported)."""
  flags = {key: str(value) for key, value in FLAGS.items()}
  if request.param != 'plain':
    flags['model.quantize'] = request.param
  folder = tmp_path_factory.mktemp(f'loram_{request.param}') / 'run'
  return folder, training.train(config.load(f'{config_file}:loram', flags), folder)


def test_a_run_trains_the_narrow_model_and_writes_for_the_whole_one(run, tmp_path, images, capsys):
  folder, report = run
  pretrained, tuned, theta = training.reopen(folder)
  whole = models.load(training.describe(folder)[0].model.source, num_classes=2)
  assert pretrained.model == whole.model and pretrained.model.mlp_dim == 32
  assert report['total'] < jpeft.count(whole.variables)
  told = f'cut to {report["total"]:,} of {jpeft.count(whole.variables):,} numbers'
  assert told in report['narrow'] and told in (folder / 'report.md').read_text()
  own = theta['loram']['encoder/block_1/mlp/fc2']['kernel']
  assert own['a'].shape == (32, 2)
  assert np.count_nonzero(np.asarray(own['a']).any(1)) == 16
  assert np.asarray(theta['loram']['encoder/block_0/mlp/fc2']['kernel']['a']).any(1).all()

  capsys.readouterr()
  file = next((images / 'test/red').iterdir())
  assert predict.main(['--run', str(folder), '--input', str(file)]) == 0
  assert capsys.readouterr().out.split('\t')[1] in ('red', 'blue')
  assert merge.main(['--run', str(folder), '--out', str(tmp_path / 'merged')]) == 0
  merged = models.load(tmp_path / 'merged')
  assert merged.model.mlp_dim == 32 and merged.model.heads == 2
  assert float(capsys.readouterr().out.split(' are ')[1].split()[0]) < 1e-5
  assert adapter.main(['--run', str(folder), '--out', str(tmp_path / 'adapter')]) == 0
  method, again = jpeft.load_adapter(tmp_path / 'adapter', pretrained)
  x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype('float32')
  loaded = jpeft.attach(pretrained.model, method, pretrained.variables, x)
  out = jax.jit(loaded.apply)(again, pretrained.variables, x)
  expected = jax.jit(tuned.apply)(theta, pretrained.variables, x)
  np.testing.assert_allclose(out, expected, atol=1e-5)


def test_a_run_stores_the_narrow_kernels_as_it_is_told(run):
  folder, report = run
  settings, _ = training.describe(folder)
  whole = models.load(settings.model.source, num_classes=2)
  assert report['storage'] == settings.model.quantize
  if report['storage'] is None:
    assert report['backbone_bytes'] == 4 * report['total'] < jpeft.nbytes(whole.variables)
  else:
    assert report['backbone_bytes'] < 4 * report['total']
  # A plan goes by the same sizes.
  described, tuned = training.build(settings, 2, models.describe)
  assert jpeft.count(described.variables) == report['total']
  assert jpeft.nbytes(described.variables) == report['backbone_bytes']
  assert jpeft.summary(tuned).trainable == report['trainable']


@pytest.mark.parametrize(
  ('flag', 'value', 'told'),
  [
    ('method.skip_first', 2, 'none of the 2 layers lies between the first 2 and the last 0'),
    ('method.start', 'other', 'config.method.start: loram trains on a narrow model'),
  ],
)
def test_what_a_run_cannot_do(config_file, tmp_path, flag, value, told):
  flags = {key: str(value) for key, value in (FLAGS | {'method.by': 'random', flag: value}).items()}
  with pytest.raises(cli.Mistake, match=told):
    training.train(config.load(f'{config_file}:loram', flags), tmp_path / 'run')


@pytest.mark.parametrize(
  ('hyperparameters', 'told'),
  [
    ({'ratio': 1.0}, r'ratio=1.0 must lie in \[0, 1\)'),
    ({'by': 'norm'}, "by='norm' is none of 'importance', 'random'"),
    ({'skip_first': -1}, 'skip_first=-1 must be a whole number, at least 0'),
    ({'batches': 0}, 'batches=0 must be a whole number, at least 1'),
    ({'alpha': 0}, 'alpha=0 must be greater than 0'),
  ],
)
def test_refusals(hyperparameters, told):
  with pytest.raises(ValueError, match=told):
    loram(**hyperparameters)


def test_what_prunes_for_good_is_not_recovered():
  model, held = llama()
  small, _, own = narrow()
  lasting = small._replace(method=jpeft.lora(2))
  with pytest.raises(ValueError, match='lora: what it leaves out stays so'):
    jpeft.recovered(lasting, model, held, own, TOKENS)
