"""Adapter folders of peft: read as peft computes them, written as peft writes them."""

import functools
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from tests import fixtures
from tests.methods.golden import peft
from tests.models.goldens import golden

CASES = {
  'bert_lora': {
    'r': 4,
    'lora_alpha': 8,
    'rank_pattern': {'value': 2},
    'alpha_pattern': {'value': 6},
  },
  'bert_rslora': {'r': 3, 'lora_alpha': 5, 'use_rslora': True},
  'bert_dora': {'r': 2, 'lora_alpha': 4, 'use_dora': True},
  'bert_word': {'r': 2, 'lora_alpha': 4},
}


@functools.cache
def of_peft(case: str) -> dict:
  """The tensors of the file, as peft names them."""
  return {
    f'base_model.model.{key}': x for key, x in peft.read('peft_models', case)['adapter'].items()
  }


@pytest.fixture
def folder(tmp_path):
  """folder(case, tensors, **config) -> an adapter folder."""

  def made(case, tensors=None, **config):
    save_file(
      {k: np.ascontiguousarray(x) for k, x in (tensors or of_peft(case)).items()},
      tmp_path / 'adapter_model.safetensors',
    )
    told = {'peft_type': 'LORA', **CASES[case], **config}
    (tmp_path / 'adapter_config.json').write_text(
      json.dumps({k: x for k, x in told.items() if x is not None})
    )
    return tmp_path

  return made


@pytest.fixture(scope='module')
def bert(tmp_path_factory):
  """bert(**options) -> (the loaded backbone, the arguments of a call)."""
  folder = tmp_path_factory.mktemp('bert')
  _, _, args = peft.bert(folder)
  return lambda **options: (jpeft.load(folder, **options), args)


def attached(loaded, args, adapter):
  method, theta = jpeft.load_adapter(adapter, loaded)
  tuned = jpeft.attach(loaded.model, method, loaded.variables, *args)
  assert jax.tree.map(np.shape, theta) == jax.tree.map(np.shape, tuned.shapes)
  return tuned, theta


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('case', CASES)
def test_what_peft_wrote_computes_what_it_computed(case, scan, folder, bert):
  loaded, args = bert(scan=scan)
  tuned, theta = attached(loaded, args, folder(case))
  np.testing.assert_allclose(
    jax.jit(tuned.apply)(theta, loaded.variables, *args),
    peft.read('peft_models', case)['logits'],
    atol=5e-6,
  )


@pytest.mark.parametrize('case', CASES)
def test_what_is_written_is_what_peft_wrote(case, folder, bert, tmp_path):
  loaded, args = bert(scan=case == 'bert_dora')
  tuned, theta = attached(loaded, args, folder(case))
  told = CASES[case]
  jpeft.save_adapter(
    tmp_path / 'out',
    loaded,
    theta,
    rslora=told.get('use_rslora', False),
    base='tiny',
    tuned=tuned,
  )
  want = {key: x for key, x in of_peft(case).items() if '.base_layer.' not in key}
  found = load_file(tmp_path / 'out' / 'adapter_model.safetensors')
  assert found.keys() == want.keys()
  jax.tree.map(np.testing.assert_array_equal, found, want)
  config = json.loads((tmp_path / 'out' / 'adapter_config.json').read_text())
  assert [config[k] for k in ('r', 'lora_alpha', 'base_model_name_or_path', 'task_type')] == [
    told['r'],
    told['lora_alpha'],
    'tiny',
    None,
  ]
  if case == 'bert_lora':
    values = [f'bert.encoder.layer.{i}.attention.self.value' for i in range(2)]
    assert config['rank_pattern'] == dict.fromkeys(values, 2)
    assert config['alpha_pattern'] == dict.fromkeys(values, 6)
  again = jpeft.load_adapter(tmp_path / 'out', loaded)[1]
  jax.tree.map(np.testing.assert_array_equal, again, theta)


def test_a_start_from_the_matrix_and_a_head_come_back_as_one_function(bert, tmp_path):
  loaded, args = bert()
  method = jpeft.chain(
    jpeft.lora(2, 5, '{q}|{fc1}', init='pissa', rslora=True), jpeft.tune('{head}')
  )
  tuned = jpeft.attach(loaded.model, method, loaded.variables, *args)
  theta = jax.tree.map(lambda x: x + 0.05, tuned.init(jax.random.key(0), loaded.variables))
  theta['lora'] = {
    path: {'kernel': {**t['kernel'], **{n: t['kernel'][n] - 0.05 for n in ('a0', 'b0')}}}
    for path, t in theta['lora'].items()
  }
  jpeft.save_adapter(tmp_path, loaded, theta, 5, True)
  config = json.loads((tmp_path / 'adapter_config.json').read_text())
  assert config['r'] == 4 and config['use_rslora']
  assert config['modules_to_save'] == ['classifier'] and config['task_type'] == 'SEQ_CLS'
  again, kept = attached(loaded, args, tmp_path)
  np.testing.assert_allclose(
    again.apply(kept, loaded.variables, *args),
    tuned.apply(theta, loaded.variables, *args),
    atol=5e-6,
  )


@pytest.mark.parametrize('scan', [False, True])
def test_dora_of_a_table_is_written_by_the_names_of_peft(scan, bert, tmp_path):
  loaded, args = bert(scan=scan)
  method = jpeft.dora(2, 4, 'embed/word|{q}')
  tuned = jpeft.attach(loaded.model, method, loaded.variables, *args)
  theta = jax.tree.map(lambda x: x + 0.1, tuned.init(jax.random.key(0), loaded.variables))
  jpeft.save_adapter(tmp_path, loaded, theta, 4, tuned=tuned)
  tensors = load_file(tmp_path / 'adapter_model.safetensors')
  table = 'base_model.model.bert.embeddings.word_embeddings.lora_'
  shapes = {key.removeprefix(table): x.shape for key, x in tensors.items() if table in key}
  words, width = loaded.variables['params']['embed']['word']['embedding'].shape
  assert shapes == {
    'embedding_A': (2, words),
    'embedding_B': (width, 2),
    'magnitude_vector': (width,),
  }
  assert sum(key.endswith('query.lora_magnitude_vector') for key in tensors) == 2
  assert json.loads((tmp_path / 'adapter_config.json').read_text())['use_dora']
  again, kept = attached(loaded, args, tmp_path)
  np.testing.assert_allclose(
    again.apply(kept, loaded.variables, *args),
    tuned.apply(theta, loaded.variables, *args),
    atol=5e-6,
  )


def test_an_adapter_goes_on_a_backbone_in_4_bits(folder, bert):
  small, args = bert(quantize=jpeft.nf4(32))
  tuned, theta = attached(small, args, folder('bert_lora'))
  plain = jax.tree.map(
    lambda x: x.unbox() if isinstance(x, jpeft.Box) else x,
    small.variables,
    is_leaf=lambda x: isinstance(x, jpeft.Box),
  )
  over = jpeft.attach(small.model, jpeft.load_adapter(folder('bert_lora'), small)[0], plain, *args)
  assert jpeft.nbytes(small.variables) < jpeft.nbytes(plain)
  np.testing.assert_allclose(
    tuned.apply(theta, small.variables, *args), over.apply(theta, plain, *args), atol=5e-6
  )


# Fields that change what peft computes, with a value that peft's own classes write.
REFUSED = {
  'alora_invocation_tokens': [5, 6],
  'use_qalora': True,
  'init_lora_weights': 'lora_ga',
  'arrow_config': {'top_k': 3, 'router_temperature': 1.0},
  'use_bdlora': {'target_modules_bd_a': ['query'], 'nblocks': 2},
  'layer_replication': [[0, 2], [1, 2]],
  'monteclora_config': {'num_samples': 8},
  'kasa_config': {'beta': 1e-4},
  'target_parameters': ['experts.weight'],
  'megatron_config': {'tp': 2},
  'fan_in_fan_out': True,
  'use_what_comes_next': True,
}


@pytest.mark.parametrize('field', REFUSED)
def test_fields_that_are_not_understood_are_refused_by_name(field, folder, bert):
  with pytest.raises(ValueError, match=f'adapter_config.json: {field}='):
    jpeft.load_adapter(folder('bert_lora', **{field: REFUSED[field]}), bert()[0])


def test_fields_without_effect_and_unused_ones_pass(folder, bert):
  unused = {
    'use_what_comes_next': False,
    'arrow_config': None,
    'loftq_config': {},
    'lora_dropout': 0.3,
  }
  _, theta = jpeft.load_adapter(folder('bert_lora', peft_version='9', **unused), bert()[0])
  assert set(theta) == {'lora', 'lora_r2_alpha6'}


KEY = 'base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight'


@pytest.mark.parametrize(
  ('change', 'config', 'message'),
  [
    ({}, {'peft_type': 'MISS'}, "peft_type='MISS' is not supported, only LORA, IA3, LN_TUNING"),
    ({}, {'peft_type': 'IA3'}, "lora_A.weight' is of LORA, and adapter_config.json says IA3"),
    ({}, {'bias': 'some'}, "bias='some' is none of none, all, lora_only"),
    ({}, {'init_lora_weights': 'pissa_niter_4'}, 'have peft convert it to plain LoRA'),
    ({}, {'r': None}, 'adapter_config.json lacks r'),
    ({}, {'r': '4'}, 'adapter_config.json: r must be an integer of 64 bits or null, not "4"'),
    ({}, {'rank_pattern': {'(a+)+': 4}}, r"'\(a\+\)\+' of adapter_config.json repeats a group"),
    ({}, {'rank_pattern': {'[': 4}}, r"'\[' of adapter_config.json is no regex"),
    ({KEY: None}, {}, "'encoder/block_0/attention/query/kernel' lacks b"),
    (
      {KEY: None, KEY.replace('query', 'qwery'): np.zeros((16, 4), 'f')},
      {},
      r"has no place .* the nearest is '.*query",
    ),
    ({}, {'r': 5}, 'is of rank 4, and adapter_config.json says 5'),
  ],
)
def test_what_does_not_fit_is_told(change, config, message, folder, bert):
  tensors = {k: x for k, x in (of_peft('bert_lora') | change).items() if x is not None}
  with pytest.raises(ValueError, match=message):
    jpeft.load_adapter(folder('bert_lora', tensors, **config), bert()[0])


def test_some_layers_of_a_scanned_stack_are_told(folder, bert):
  first = {k: x for k, x in of_peft('bert_lora').items() if '.layer.0.' in k}
  _, theta = jpeft.load_adapter(folder('bert_lora', first), bert()[0])
  assert set(theta['lora']) == {'encoder/block_0/attention/query'}
  with pytest.raises(
    ValueError, match='adapts some layers of .* load the backbone with scan=False'
  ):
    jpeft.load_adapter(folder('bert_lora', first), bert(scan=True)[0])


@pytest.mark.parametrize('scan', [False, True])
def test_a_method_in_some_layers_writes_those(scan, bert, tmp_path):
  loaded, args = bert(scan=scan)
  method = jpeft.in_layers(jpeft.lora(2, 8, '{q}'), '-1:')
  tuned = jpeft.attach(loaded.model, method, loaded.variables, *args)
  theta = jax.tree.map(lambda x: x + 0.1, tuned.init(jax.random.key(0), loaded.variables))
  if scan:
    with pytest.raises(ValueError, match='theta has 1 layers for .*, and the model 2: .* tuned='):
      jpeft.save_adapter(tmp_path, loaded, theta, 8)
  jpeft.save_adapter(tmp_path, loaded, theta, 8, tuned=tuned)
  names = load_file(tmp_path / 'adapter_model.safetensors')
  assert len(names) == 2 and all('.layer.1.' in name for name in names)
  unrolled, _ = bert()
  again, loaded_theta = attached(unrolled, args, tmp_path)
  np.testing.assert_allclose(
    again.apply(loaded_theta, unrolled.variables, *args),
    tuned.apply(theta, loaded.variables, *args),
    atol=5e-6,
  )


def test_damaged_and_missing_files_are_told(folder, bert):
  loaded = bert()[0]
  made = folder('bert_lora')
  file = made / 'adapter_model.safetensors'
  file.write_bytes(file.read_bytes()[:-10])
  with pytest.raises(ValueError, match='is damaged or was not'):
    jpeft.load_adapter(made, loaded)
  file.unlink()
  with pytest.raises(FileNotFoundError, match='there is no file .*adapter_model.safetensors'):
    jpeft.load_adapter(made, loaded)
  (made / 'adapter_config.json').unlink()
  with pytest.raises(FileNotFoundError, match='holds no adapter_config.json'):
    jpeft.load_adapter(made, loaded)


@pytest.mark.parametrize(
  ('method', 'message'),
  [
    (jpeft.ssf('{q}'), 'an adapter folder'),
    (jpeft.bitfit(), 'neither LoRA nor DoRA'),
    (jpeft.chain(jpeft.lora(2), jpeft.dora(2, name='d')), 'both LoRA and DoRA'),
    (jpeft.chain(jpeft.lora(2), jpeft.tune('{head}', 'kernel')), 'only a part of'),
    (jpeft.chain(jpeft.lora(2), jpeft.tune('{q}', 'kernel')), 'trains .* and adapts it'),
  ],
)
def test_what_such_folders_cannot_hold_is_told(method, message, bert, tmp_path):
  loaded, args = bert()
  theta = jpeft.attach(loaded.model, method, loaded.variables, *args).init(
    jax.random.key(0), loaded.variables
  )
  with pytest.raises(ValueError, match=message):
    jpeft.save_adapter(tmp_path / 'out', loaded, theta, 8)
  assert not (tmp_path / 'out').exists()


def test_a_generated_method_writes_what_its_rules_read(bert, tmp_path):
  loaded, args = bert()
  double = lambda t, scale: jax.tree.map(lambda x: scale * x, t)
  method = jpeft.generated(
    jpeft.lora(2, 4),
    lambda key, places: {path: double(place.t, 0.5) for path, place in places.items()},
    lambda t, places: double(t, 2.0),
  )
  tuned = jpeft.attach(loaded.model, method, loaded.variables, *args)
  theta = fixtures.noisy(tuned.init(jax.random.key(0), loaded.variables))
  jpeft.save_adapter(tmp_path, loaded, theta, 4, tuned=tuned)
  _, again = jpeft.load_adapter(tmp_path, loaded)
  jax.tree.map(np.testing.assert_allclose, again, tuned.expand(theta))
  shared = {'lora': {'': {'a': np.zeros((2, 2))}}}
  with pytest.raises(ValueError, match='whole modules; of a generated method, give tuned='):
    jpeft.save_adapter(tmp_path, loaded, shared, 4)


def test_a_part_of_a_layer_is_told(bert, tmp_path):
  loaded, args = bert()
  query = r'.*/attention/query'
  anatomy = jpeft.Anatomy('halves', {'block': r'.*/block_\d', 'q': jpeft.Part(query, take=(0, 2))})
  jpeft.register_anatomy(anatomy)
  try:
    tuned = jpeft.attach(loaded.model, jpeft.lora(2, targets='{q}'), loaded.variables, *args)
  finally:
    del jpeft.ANATOMIES['halves']
  theta = tuned.init(jax.random.key(0), loaded.variables)
  with pytest.raises(ValueError, match="at '.*query:q', and no array .* whole modules"):
    jpeft.save_adapter(tmp_path / 'out', loaded, theta, 8)


# ---- Several rules, and what the folder says beside what they compute.


def trained_like(loaded, method, args):
  tuned = jpeft.attach(loaded.model, method, loaded.variables, *args)
  return tuned, fixtures.noisy(tuned.init(jax.random.key(0), loaded.variables))


def check_written(tuned, theta, loaded, args, folder, **options):
  """Writes a folder, puts it on again, and compares the outputs; the theta that was read."""
  jpeft.save_adapter(folder, loaded, theta, tuned=tuned, **options)
  again, kept = attached(loaded, args, folder)
  np.testing.assert_allclose(
    again.apply(kept, loaded.variables, *args),
    tuned.apply(theta, loaded.variables, *args),
    atol=5e-6,
  )
  return kept


@pytest.mark.parametrize('scan', [False, True])
def test_adapters_of_other_alphas_at_other_sites_are_written_by_patterns(scan, bert, tmp_path):
  loaded, args = bert(scan=scan)
  method = jpeft.chain(
    jpeft.lora(2, 4, '{q}'),
    jpeft.lora(2, 1, '{v}', name='weak'),
    jpeft.lora(3, 7, '{fc1}', rslora=True, name='root'),
  )
  tuned, theta = trained_like(loaded, method, args)
  check_written(tuned, theta, loaded, args, tmp_path)
  config = json.loads((tmp_path / 'adapter_config.json').read_text())
  layer = 'bert.encoder.layer.1.'
  assert config['rank_pattern'][f'{layer}intermediate.dense'] == 3
  # 7 / sqrt(3) is what 7 sqrt(3) / 3 is.
  np.testing.assert_allclose(
    config['alpha_pattern'][f'{layer}intermediate.dense'], 7 * 3**0.5, rtol=1e-5
  )
  assert {config['lora_alpha'], config['alpha_pattern'][f'{layer}attention.self.value']} == {4, 1}


def test_dora_tells_its_scale_too(bert, tmp_path):
  loaded, args = bert()
  method = jpeft.chain(jpeft.dora(2, 4, '{q}'), jpeft.dora(3, 1, '{v}|embed/word', name='weak'))
  check_written(*trained_like(loaded, method, args), loaded, args, tmp_path)


@pytest.mark.parametrize('init', ['pissa', 'olora'])
def test_a_start_from_the_matrix_tells_its_scale_too(init, bert, tmp_path):
  loaded, args = bert(scan=True)
  tuned, theta = trained_like(loaded, jpeft.lora(2, 5, '{q}', init=init), args)
  check_written(tuned, theta, loaded, args, tmp_path)


def test_two_adapters_at_one_site_are_told(bert, tmp_path):
  loaded, args = bert()
  method = jpeft.chain(jpeft.lora(2, 4), jpeft.lora(2, 8, name='other'))
  tuned, theta = trained_like(loaded, method, args)
  with pytest.raises(ValueError, match='two adapters at .*query/kernel.*concat'):
    jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned)


def test_an_alpha_that_is_not_the_methods_is_told(bert, tmp_path):
  loaded, args = bert()
  tuned, theta = trained_like(loaded, jpeft.lora(2, 4), args)
  with pytest.raises(ValueError, match=r"alpha=8 with .* by 4, and 'lora' at .* by 2: leave alpha"):
    jpeft.save_adapter(tmp_path, loaded, theta, 8, tuned=tuned)
  with pytest.raises(ValueError, match='give tuned=.* or alpha='):
    jpeft.save_adapter(tmp_path, loaded, theta)
  both = {**theta, 'other': theta['lora']}
  with pytest.raises(ValueError, match=r'several adapters \(lora, other\).*give tuned='):
    jpeft.save_adapter(tmp_path, loaded, both, 4)


def test_a_rule_that_computes_something_else_is_told(bert, tmp_path):
  loaded, args = bert()

  def init(key, w):
    return {'a': jax.random.normal(key, (w.shape[0], 2)), 'b': np.ones((2, w.shape[1]), 'f')}

  def weight(t, w):
    return w * (1 + t['a'] @ t['b'])

  tuned, theta = trained_like(loaded, jpeft.at('{q}', jpeft.matrix('gain', init, weight)), args)
  with pytest.raises(ValueError, match="computes something else than 'gain' at .*query"):
    jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned)
  assert not list(tmp_path.iterdir())


# ---- Layers of a scanned stack.


@pytest.mark.parametrize('case', ['bert_lora', 'bert_rslora'])
@pytest.mark.parametrize('scan', [False, True])
def test_layers_may_differ_in_alpha_and_rank(scan, case, folder, bert):
  """The same outputs by arithmetic on the factors: a b is scaled by alpha / r of its own layer."""
  loaded, args = bert(scan=scan)
  tensors = dict(of_peft(case))
  wider = {}
  for key, x in tensors.items():
    if '.layer.1.' in key and '.query.' in key:
      axis = 0 if 'lora_A' in key else 1
      wider[key] = np.concatenate([x, x], axis)
  plain = {'alpha_pattern': {}, 'rank_pattern': CASES[case].get('rank_pattern', {})}
  r, alpha = CASES[case]['r'], CASES[case]['lora_alpha']
  # a b of a factor that is there twice is 2 a b.
  power = 0.5 if CASES[case].get('use_rslora') else 1
  uneven = {
    'rank_pattern': {**plain['rank_pattern'], 'layer.1.attention.self.query': 2 * r},
    'alpha_pattern': {
      'layer.1.attention.self.query': alpha * 2**power * -0.25,
      'layer.0.attention.self.query': alpha * 3,
    },
  }
  if case == 'bert_lora':
    uneven['alpha_pattern']['value'] = plain['alpha_pattern']['value'] = 6
  tuned, theta = attached(loaded, args, folder(case, {**tensors, **wider}, **uneven))
  got = tuned.apply(theta, loaded.variables, *args)

  for key in tensors:
    if '.query.lora_B' in key:
      tensors[key] = tensors[key] * (3.0 if '.layer.0.' in key else -0.5)
  flat, _ = bert()
  tuned, theta = attached(flat, args, folder(case, tensors, **plain))
  np.testing.assert_allclose(got, tuned.apply(theta, flat.variables, *args), atol=5e-6)


@pytest.mark.parametrize('alpha', [0, -3])
def test_an_alpha_that_peft_allows_is_served(alpha, folder, bert):
  loaded, args = bert()
  tensors = dict(of_peft('bert_rslora'))
  tuned, theta = attached(loaded, args, folder('bert_rslora', tensors, lora_alpha=alpha))
  got = tuned.apply(theta, loaded.variables, *args)
  for key, x in tensors.items():
    if 'lora_B' in key:
      tensors[key] = x * (alpha / 5)
  tuned, theta = attached(loaded, args, folder('bert_rslora', tensors, lora_alpha=5))
  np.testing.assert_allclose(got, tuned.apply(theta, loaded.variables, *args), atol=5e-6)


def test_two_folders_are_chained_by_their_names(folder, bert):
  loaded, args = bert()
  one, first = jpeft.load_adapter(folder('bert_lora'), loaded)
  head = {'base_model.model.classifier.weight': np.ones((3, 16), 'f')}
  head['base_model.model.classifier.bias'] = np.ones(3, 'f')
  made = folder('bert_dora', {**of_peft('bert_dora'), **head})
  other, second = jpeft.load_adapter(made, loaded, name='de')
  assert set(second) == {'de', 'de_modules'}
  both = jpeft.chain(one, other)
  tuned = jpeft.attach(loaded.model, both, loaded.variables, *args)
  theta = {**first, **second}
  assert jax.tree.map(np.shape, theta) == jax.tree.map(np.shape, tuned.shapes)


# ---- Biases.


@pytest.mark.parametrize('scan', [False, True])
def test_biases_are_read_and_written(scan, bert, tmp_path):
  loaded, args = bert(scan=scan)
  method = jpeft.chain(jpeft.lora(2, 4, '{q}'), jpeft.bitfit())
  tuned, theta = trained_like(loaded, method, args)
  kept = check_written(tuned, theta, loaded, args, tmp_path)
  assert set(kept) == {'lora', 'bias'}
  assert json.loads((tmp_path / 'adapter_config.json').read_text())['bias'] == 'all'
  names = load_file(tmp_path / 'adapter_model.safetensors')
  layer = 'base_model.model.bert.encoder.layer.1.'
  assert {f'{layer}attention.self.query.base_layer.bias', f'{layer}output.LayerNorm.bias'} <= {
    *names
  }


def test_a_bias_of_b_is_added_to_that_of_the_layer(folder, bert):
  loaded, args = bert()
  key = KEY.replace('weight', 'bias')
  added = np.linspace(-1, 1, 16, dtype='f')
  tuned, theta = attached(
    loaded, args, folder('bert_lora', {**of_peft('bert_lora'), key: added}, lora_bias=True)
  )
  query = loaded.variables['params']['encoder']['block_0']['attention']['query']
  np.testing.assert_allclose(
    theta['bias']['encoder/block_0/attention/query']['bias'], query['bias'] + 2 * added, rtol=1e-6
  )


# ---- Names.


VIT = {
  'model_type': 'vit',
  'hidden_size': 16,
  'num_hidden_layers': 2,
  'num_attention_heads': 2,
  'intermediate_size': 24,
  'image_size': 8,
  'patch_size': 4,
}


@pytest.mark.parametrize('kind', ['vit', 'deit', 'dinov2'])
def test_both_namings_are_read_and_the_one_asked_for_is_written(kind, tmp_path):
  config = {**VIT, 'model_type': kind}
  model = jpeft.models.from_config(config, num_classes=3)
  images = fixtures_images()
  variables = model.init(jax.random.key(0), images)
  loaded = jpeft.models.Pretrained(model, variables, config, kind, None, None, {})
  method = jpeft.lora(2, 4, '{linear}')
  tuned, theta = trained_like(loaded, method, (images,))
  for names in ('transformers>=5', 'transformers<5'):
    jpeft.save_adapter(tmp_path / names, loaded, theta, tuned=tuned, names=names)
    again = jpeft.load_adapter(tmp_path / names, loaded)[1]
    jax.tree.map(np.testing.assert_array_equal, again, theta)
  new = json.loads((tmp_path / 'transformers>=5/adapter_config.json').read_text())
  old = json.loads((tmp_path / 'transformers<5/adapter_config.json').read_text())
  stack = f'{kind}.encoder.layer.1' if kind == 'dinov2' else f'{kind}.layers.1'
  for end in ('attention.q_proj', 'attention.o_proj', 'mlp.fc1', 'mlp.fc2'):
    assert f'{stack}.{end}' in new['target_modules']
  assert f'{kind}.encoder.layer.1.attention.attention.query' in old['target_modules']
  with pytest.raises(ValueError, match="names='5' is none of 'transformers>=5'"):
    jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned, names='5')


def fixtures_images():
  return np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype('float32')


# ---- Heads that are tables.


@pytest.mark.parametrize('tied', [False, True])
def test_a_table_that_is_the_head_is_written_as_both(tied, tmp_path):
  loaded = jpeft.load('tests/models/golden/qwen3')
  if not tied:
    loaded = jpeft.models.untied(loaded)
  tokens = np.arange(3, 13)[None]
  tuned, theta = trained_like(loaded, jpeft.lora(2, 4, 'embed|{q}'), (tokens,))
  check_written(tuned, theta, loaded, (tokens,), tmp_path)
  names = load_file(tmp_path / 'adapter_model.safetensors')
  assert ('base_model.model.lm_head.lora_A.weight' in names) == tied
  config = json.loads((tmp_path / 'adapter_config.json').read_text())
  assert config['ensure_weight_tying'] == tied


def test_what_would_part_a_table_from_its_head_is_told(tmp_path):
  loaded = jpeft.load('tests/models/golden/qwen3')
  tokens = np.arange(3, 13)[None]
  tuned, theta = trained_like(loaded, jpeft.dora(2, 4, 'embed'), (tokens,))
  with pytest.raises(ValueError, match='DoRA of .embed/embedding., which is the head'):
    jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned)
  tuned, theta = trained_like(loaded, jpeft.lora(2, 4, 'embed'), (tokens,))
  jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned)
  file = tmp_path / 'adapter_model.safetensors'
  save_file({k: x for k, x in load_file(file).items() if 'lm_head' not in k}, file)
  jpeft.load_adapter(tmp_path, loaded)
  told = tmp_path / 'adapter_config.json'
  told.write_text(told.read_text().replace('tying": true', 'tying": false'))
  with pytest.raises(ValueError, match='peft changes the table alone .*untied'):
    jpeft.load_adapter(tmp_path, loaded)
  jpeft.load_adapter(tmp_path, jpeft.models.untied(loaded))


def test_the_table_of_t5_is_told(tmp_path):
  loaded = jpeft.load('tests/models/golden/t5')
  tokens = np.arange(3, 13)[None]
  tuned, theta = trained_like(loaded, jpeft.lora(2, 4, 'embed'), (tokens, tokens))
  with pytest.raises(ValueError, match='no layer of T5 reads the module of this table'):
    jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned)


def test_a_table_of_another_backbone_is_told(folder, bert):
  key = 'base_model.model.bert.embeddings.word_embeddings.base_layer.weight'
  tensors = of_peft('bert_word')
  found = [name for name in tensors if '.base_layer.' in name]
  changed = {**tensors, key: np.ones((24, 16), 'f')}
  assert found in ([], [key])
  with pytest.raises(ValueError, match='is not what this backbone has there'):
    jpeft.load_adapter(folder('bert_word', changed), bert()[0])


def test_a_classifier_of_roberta_is_one_module(tmp_path):
  loaded = jpeft.load('tests/models/golden/roberta')
  tokens = np.arange(3, 13)[None]
  method = jpeft.chain(jpeft.lora(2, 4), jpeft.tune('head'))
  tuned, theta = trained_like(loaded, method, (tokens,))
  check_written(tuned, theta, loaded, (tokens,), tmp_path)
  config = json.loads((tmp_path / 'adapter_config.json').read_text())
  assert config['modules_to_save'] == ['classifier'] and config['task_type'] == 'SEQ_CLS'
  names = load_file(tmp_path / 'adapter_model.safetensors')
  assert {'dense.weight', 'dense.bias', 'out_proj.weight', 'out_proj.bias'} == {
    name.partition('.classifier.')[2] for name in names if '.classifier.' in name
  }


# ---- Kinds other than LoRA.


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize(
  ('method', 'kind', 'ends'),
  [
    (jpeft.ia3('{k}|{v}', '{q}|{fc2}'), 'IA3', {'ia3_l'}),
    (jpeft.chain(jpeft.ia3(), jpeft.tune('{head}')), 'IA3', {'ia3_l', 'bias', 'weight'}),
    (jpeft.norm(), 'LN_TUNING', {'bias', 'weight'}),
    (jpeft.chain(jpeft.norm(), jpeft.tune('{head}')), 'LN_TUNING', {'bias', 'weight'}),
  ],
)
def test_scales_and_norms_come_back_as_one_function(method, kind, ends, scan, bert, tmp_path):
  loaded, args = bert(scan=scan)
  tuned, theta = trained_like(loaded, method, args)
  check_written(tuned, theta, loaded, args, tmp_path)
  config = json.loads((tmp_path / 'adapter_config.json').read_text())
  assert config['peft_type'] == kind
  names = load_file(tmp_path / 'adapter_model.safetensors')
  assert {name.rpartition('.')[2] for name in names} == ends
  if kind == 'LN_TUNING':
    assert all('.ln_tuning_layers.' in name or '.classifier.' in name for name in names)


def test_scales_of_what_are_inputs_and_outputs_alike_need_the_rule(bert, tmp_path):
  loaded, args = bert()
  tuned, theta = trained_like(loaded, jpeft.ia3(None, '{q}'), args)
  with pytest.raises(ValueError, match='inputs and outputs are as many: give tuned='):
    jpeft.save_adapter(tmp_path, loaded, theta)
  tuned, theta = trained_like(loaded, jpeft.ia3(None, '{fc2}'), args)
  jpeft.save_adapter(tmp_path, loaded, theta)
  config = json.loads((tmp_path / 'adapter_config.json').read_text())
  assert config['feedforward_modules'] == config['target_modules']


def test_theta_that_is_no_array_of_its_own_is_told(bert, tmp_path):
  """An array that is added to that of the backbone, or of another shape, is not trained whole."""
  loaded, args = bert()

  def added(theta, site, arrays):
    return {name: arrays[name] + t for name, t in theta.items()}

  moved = jpeft.Weight('moved', lambda key, site, arrays: dict(arrays), added)
  method = jpeft.chain(jpeft.lora(2), jpeft.at('{norm}', moved))
  tuned, theta = trained_like(loaded, method, args)
  with pytest.raises(ValueError, match="'moved' at .*norm1' does more than train '(scale|bias)'"):
    jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned)
  theta = {'lora': theta['lora'], 'head': {'head': {'kernel': np.ones((2, 3)), 'bias': np.ones(3)}}}
  with pytest.raises(ValueError, match=r"array \[2, 3\] for 'head/kernel', which is \[16, 3\]"):
    jpeft.save_adapter(tmp_path, loaded, theta, 8)


@pytest.mark.parametrize('scan', [False, True])
def test_vera_computes_what_it_computed_in_peft(scan, bert, tmp_path):
  loaded, args = bert(scan=scan)
  held = peft.read('peft_models', 'bert_vera')
  tensors = {}
  for key, x in held['adapter'].items():
    name = key if key.startswith('base_model.') else f'base_model.model.{key}'
    tensors[name] = np.ascontiguousarray(x)
  save_file(tensors, tmp_path / 'adapter_model.safetensors')
  (tmp_path / 'adapter_config.json').write_text(json.dumps({'peft_type': 'VERA', 'r': 3}))
  tuned, theta = attached(loaded, args, tmp_path)
  assert set(theta) == {'vera'}
  np.testing.assert_allclose(
    jax.jit(tuned.apply)(theta, loaded.variables, *args), held['logits'], atol=5e-6
  )
  without = {key: x for key, x in tensors.items() if 'vera_A' not in key}
  save_file(without, tmp_path / 'adapter_model.safetensors')
  with pytest.raises(ValueError, match='lacks the projections vera_A and vera_B'):
    jpeft.load_adapter(tmp_path, loaded)


def doubled(t, call, *args, **kwargs):
  return call.site.map_stream(call(*args, **kwargs), lambda x: 2 * x)


@pytest.mark.parametrize(
  'rule',
  (
    jpeft.Call('doubled', doubled),
    jpeft.Weight(
      'doubled',
      lambda key, site, arrays: {},
      lambda t, site, arrays: {name: 2 * arrays[name] for name in site.matrices},
    ),
  ),
  ids=('call', 'weight'),
)
def test_a_rule_without_theta_that_changes_the_function_is_told(rule, bert, tmp_path):
  loaded, args = bert()
  method = jpeft.chain(jpeft.lora(2, 4, '{q}'), jpeft.at('{fc2}', rule))
  tuned, theta = trained_like(loaded, method, args)
  with pytest.raises(
    ValueError, match="'doubled' at .*mlp/fc2' does what the folder does not hold"
  ):
    jpeft.save_adapter(tmp_path / 'out', loaded, theta, tuned=tuned)
  assert not (tmp_path / 'out').exists()


def test_a_rule_without_theta_that_changes_memory_alone_is_written(bert, tmp_path):
  loaded, args = bert()
  tuned, theta = trained_like(loaded, jpeft.chain(jpeft.lora(2, 4, '{q}'), jpeft.packed()), args)
  check_written(tuned, theta, loaded, args, tmp_path)


@pytest.mark.parametrize('scan', [False, True])
def test_a_prefix_that_maps_made_is_written_as_its_rows(scan, tmp_path):
  loaded = jpeft.load('tests/models/golden/llama', scan=scan)
  tokens = np.arange(3, 13)[None]
  tuned, theta = trained_like(loaded, jpeft.prefix(3, hidden=5), (tokens,))
  check_written(tuned, theta, loaded, (tokens,), tmp_path)
  config = json.loads((tmp_path / 'adapter_config.json').read_text())
  assert config['peft_type'] == 'PREFIX_TUNING' and config['task_type'] == 'CAUSAL_LM'
  (rows,) = load_file(tmp_path / 'adapter_model.safetensors').values()
  assert rows.shape == (3, 2 * config['num_layers'] * config['token_dim'])


@pytest.mark.parametrize(
  ('name', 'method', 'message'),
  (
    ('bert', jpeft.prefix(3), 'peft passes a prefix as a cache, which Bert.* does not take'),
    ('vit', jpeft.vpt_shallow(3), 'BERT family, of decoders that write text and of T5; ViTFor'),
    ('llama', jpeft.vpt_shallow(3), 'has prompts at .*: peft has them before the words'),
    ('llama', jpeft.in_layers(jpeft.prefix(3), '0'), 'peft has a prefix in all'),
    (
      'llama',
      jpeft.chain(jpeft.prefix(3), jpeft.prompt_tuning(2)),
      "theta holds 'prefix' and 'prompt_tuning'",
    ),
    ('llama', jpeft.chain(jpeft.prefix(3), jpeft.lora(2)), 'holds both .* and'),
    ('mistral', jpeft.prefix(3), 'with a window of'),
  ),
)
def test_prompts_that_peft_does_not_serve_are_refused_by_name(name, method, message, tmp_path):
  loaded = jpeft.load(f'tests/models/golden/{name}')
  inputs, _ = golden(name)
  tuned = jpeft.attach(loaded.model, method, loaded.variables, **inputs)
  theta = tuned.init(jax.random.key(0), loaded.variables)
  with pytest.raises(ValueError, match=message):
    jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned)


def test_vera_of_several_shapes_shares_one_pair(bert, tmp_path):
  loaded, args = bert(scan=True)
  method = jpeft.chain(jpeft.vera(3, '{q}|{fc1}'), jpeft.vera(2, '{fc2}', seed=1, name='other'))
  tuned, theta = trained_like(loaded, method, args)
  check_written(tuned, theta, loaded, args, tmp_path)
  tensors = load_file(tmp_path / 'adapter_model.safetensors')
  assert json.loads((tmp_path / 'adapter_config.json').read_text())['r'] == 3 + 3 + 2
  assert tensors['base_model.vera_A'].shape[0] == tensors['base_model.vera_B'].shape[1] == 8
  with pytest.raises(ValueError, match='give tuned=, whose rules know the random pair'):
    jpeft.save_adapter(tmp_path, loaded, theta)


def test_rows_of_a_table_are_written_as_rows(bert, tmp_path):
  loaded, args = bert()
  base = np.asarray(loaded.variables['params']['embed']['word']['embedding'])
  table = base.copy()
  table[[2, 5]] += 1
  for beside, field in ((False, 'token_indices'), (True, 'trainable_token_indices')):
    method = jpeft.tune('embed/word', name='table')
    if beside:
      method = jpeft.chain(jpeft.lora(2, 4, '{q}'), method)
    tuned, theta = trained_like(loaded, method, args)
    theta['table'] = {'embed/word': {'embedding': table}}
    check_written(tuned, theta, loaded, args, tmp_path / field)
    rows = json.loads((tmp_path / field / 'adapter_config.json').read_text())[field]
    assert (list(rows.values())[0] if beside else rows) == [2, 5]
    tensors = load_file(tmp_path / field / 'adapter_model.safetensors')
    (found,) = (x for key, x in tensors.items() if key.endswith('trainable_tokens_delta'))
    np.testing.assert_array_equal(found, table[[2, 5]])


@pytest.mark.parametrize(
  ('config', 'message'),
  (
    ({'trainable_token_indices': [3]}, 'lacks the rows of tables that adapter_config.json names'),
    ({'peft_type': 'TRAINABLE_TOKENS'}, 'lacks token_indices'),
    ({'peft_type': 'PREFIX_TUNING'}, 'lacks num_virtual_tokens'),
    ({'peft_type': 'PROMPT_TUNING', 'num_virtual_tokens': 2}, 'is of LORA, and .* PROMPT_TUNING'),
  ),
)
def test_rows_that_are_missing_are_told(config, message, folder, bert):
  loaded, _ = bert()
  with pytest.raises(ValueError, match=message):
    jpeft.load_adapter(folder('bert_lora', **config), loaded)
