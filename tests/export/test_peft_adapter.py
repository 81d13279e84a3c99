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
  loaded, _ = bert(scan=case == 'bert_dora')
  _, theta = jpeft.load_adapter(folder(case), loaded)
  told = CASES[case]
  if case == 'bert_lora':  # two rules of two alphas; the writer takes one
    theta = {'lora': theta['lora']}
  jpeft.save_adapter(
    tmp_path / 'out', loaded, theta, told['lora_alpha'], told.get('use_rslora', False), 'tiny'
  )
  want = {
    key: x
    for key, x in of_peft(case).items()
    if '.base_layer.' not in key and not (case == 'bert_lora' and '.value.' in key)
  }
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


KEY = 'base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight'


@pytest.mark.parametrize(
  ('change', 'config', 'message'),
  [
    ({}, {'peft_type': 'IA3'}, "peft_type='IA3' is not supported, only 'LORA'"),
    ({}, {'bias': 'all'}, "bias='all' is not supported"),
    ({}, {'init_lora_weights': 'pissa_niter_4'}, 'have peft convert it to plain LoRA'),
    ({}, {'r': None}, 'adapter_config.json lacks r'),
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
    (jpeft.chain(jpeft.lora(2), jpeft.tune('{head}', 'bias')), 'only a part of'),
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
