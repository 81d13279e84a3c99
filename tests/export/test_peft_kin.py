"""Kinds of peft with tensors of their own: folders compute what the formulas of peft say.

Those formulas are here once more, on the tensors of the file alone.
"""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from tests.fixtures import noisy
from tests.methods.golden import peft

FILE, CONFIG = 'adapter_model.safetensors', 'adapter_config.json'
QUERY = 'base_model.model.bert.encoder.layer.1.attention.self.query'
PLACES = [106, 204, 47, 105]


@pytest.fixture(scope='module')
def bert(tmp_path_factory):
  """bert(**options) -> (the loaded backbone, the arguments of a call)."""
  folder = tmp_path_factory.mktemp('bert')
  _, _, args = peft.bert(folder)
  return lambda **options: (jpeft.load(folder, **options), args)


def loha(file):
  one = file['hada_w1_a'] @ file['hada_w1_b']
  return 3 / 2 * one * (file['hada_w2_a'] @ file['hada_w2_b'])


def lokr(file):
  return 3 / 2 * np.kron(file['lokr_w1'], file['lokr_w2_a'] @ file['lokr_w2_b'])


def lokr_of_both(file):
  one = file['lokr_w1_a'] @ file['lokr_w1_b']
  return 3 * np.kron(one, file['lokr_w2_a'] @ file['lokr_w2_b'])


def hira(file):
  return file['hira_B'] @ file['hira_A']


def adalora(file):
  return 3 / 2 * file['lora_B'] @ (file['lora_E'] * file['lora_A'])


def rotations(q):
  """(I - Q) (I + Q)^-1 of one block."""
  return (np.eye(len(q)) - q) @ np.linalg.inv(np.eye(len(q)) + q)


def block_diagonal(blocks):
  size = len(blocks[0])
  found = np.zeros((size * len(blocks),) * 2)
  for i, x in enumerate(blocks):
    found[i * size : (i + 1) * size, i * size : (i + 1) * size] = x
  return found


def oft(file):
  blocks = []
  for numbers in file['oft_R.weight']:
    q = np.zeros((4, 4))
    q[np.triu_indices(4, 1)] = numbers
    blocks.append(rotations(q - q.T))
  return block_diagonal(blocks).T


def oft_by_series(file):
  q = np.zeros((8, 8))
  q[np.triu_indices(8, 1)] = file['oft_R.weight'][0]
  q = q - q.T
  one = np.eye(8) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
  return block_diagonal([one, one]).T


def boft(file):
  first, second = (
    block_diagonal([rotations((r - r.T) / 2) for r in rows]) for rows in file['boft_R']
  )
  moved = np.eye(16)[[0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]]
  return (moved @ second @ moved.T @ first).T, file['boft_s']


def fourierft(file):
  """Of peft's FourierFT: torch.randperm(256) by seed 3 begins with these."""
  spectrum = np.zeros(256)
  spectrum[PLACES] = file['fourierft_spectrum']
  return 90 * np.fft.ifft2(spectrum.reshape(16, 16)).real


def vblora(file):
  bank = file['base_model.vblora_vector_bank']

  def pieces(name):
    found = []
    for logits in file[name].reshape(-1, 5):
      kept = np.where(logits >= np.sort(logits)[-2], np.exp(logits), 0)
      found.append(kept / kept.sum() @ bank)
    return np.array(found).reshape(*file[name].shape[:-1], 4)

  a = pieces('vblora_logits_A').reshape(2, -1)
  b = np.concatenate([x.T for x in pieces('vblora_logits_B')])
  return b @ a


def randlora(file):
  a, b = file['base_model.randlora_A'][:, 0, :16], file['base_model.randlora_B'][:16, :4]
  assert a.shape == (5, 16) and b.shape == (16, 4, 5)
  rows = [
    file['randlora_lambda'][k // 4, k % 4] * a[k // 4] * file['randlora_gamma'][k % 4]
    for k in range(20)
  ]
  return 3 / 5 * b.reshape(16, 20) @ np.array(rows)


# {case: (method, what is told, the change of a kernel [out, in] of a layer's tensors)}
CASES = {
  'loha': (jpeft.loha(2, 3, '{q}|{fc1}'), {'r': 2, 'alpha': 3}, loha),
  'lokr': (jpeft.lokr(2, 3, '{q}|{fc1}', 2), {'r': 2, 'alpha': 3, 'decompose_factor': 2}, lokr),
  'hira': (jpeft.hira(2, '{q}|{fc1}'), {'r': 2}, hira),
  'adalora': (jpeft.adalora(2, 1, 3, '{q}|{fc1}'), {'init_r': 2, 'lora_alpha': 3}, adalora),
  'oft': (jpeft.oft(4, '{q}|{fc1}', terms=0), {'oft_block_size': 4, 'r': 0}, oft),
  'oft_by_series': (jpeft.oft(targets='{q}|{fc1}', blocks=2, shared=True), {'r': 2}, oft_by_series),
  'boft': (jpeft.boft(4, '{q}|{fc1}', 2), {'boft_n_butterfly_factor': 2}, boft),
  'fourierft': (
    jpeft.fourierft(4, 90, '{q}|{fc1}', seed=3),
    {'n_frequency': 4, 'scaling': 90, 'random_loc_seed': 3},
    fourierft,
  ),
  'vblora': (
    jpeft.vb_lora(2, 5, 4, targets='{q}|{fc1}'),
    {'r': 2, 'num_vectors': 5, 'vector_length': 4, 'topk': 2, 'save_only_topk_weights': False},
    vblora,
  ),
  'randlora': (
    jpeft.randlora(5, 3, '{q}|{fc1}'),
    {'r': 5, 'randlora_alpha': 3, 'save_projection': True},
    randlora,
  ),
  'lokr_of_both': (
    jpeft.lokr(1, 3, '{q}|{fc1}', both=True),
    {'r': 1, 'decompose_both': True, 'decompose_factor': -1},
    lokr_of_both,
  ),
}


def written(case, bert, folder, **options):
  """(backbone, arguments, tuned, theta) of a case, which was written to a folder."""
  method, *_ = CASES[case]
  loaded, args = bert(**options)
  tuned = jpeft.attach(loaded.model, method, loaded.variables, *args)
  theta = noisy(jax.jit(tuned.init)(jax.random.key(0), loaded.variables))
  jpeft.save_adapter(folder, loaded, theta, tuned=tuned)
  return loaded, args, tuned, theta


@pytest.mark.parametrize('case', CASES)
def test_a_folder_holds_what_the_method_computes(case, bert, tmp_path):
  loaded, args, tuned, theta = written(case, bert, tmp_path, scan=True)
  _, told, change = CASES[case]
  config = json.loads((tmp_path / CONFIG).read_text())
  assert {key: config[key] for key in told} == told
  tensors = load_file(tmp_path / FILE)
  of_query = {
    key.removeprefix(f'{QUERY}.'): x for key, x in tensors.items() if key.startswith(QUERY)
  }
  shared = ('base_model.vblora', 'base_model.randlora')
  of_query |= {key: x for key, x in tensors.items() if key.startswith(shared)}
  kernel = lambda held: held['params']['encoder']['blocks']['attention']['query']['kernel'][1]
  merged = tuned.merge(theta, loaded.variables)
  difference = kernel(merged) - kernel(loaded.variables)
  assert np.abs(difference).max() > 0
  wanted = None if 'oft' in case else change(of_query).T
  if case == 'hira':
    wanted = wanted * kernel(loaded.variables)
  if 'oft' in case:
    turn, gains = change(of_query) if case == 'boft' else (change(of_query), 1)
    wanted = (kernel(loaded.variables).T @ turn * gains).T - kernel(loaded.variables)
  np.testing.assert_allclose(difference, wanted, atol=1e-6)

  method, again = jpeft.load_adapter(tmp_path, loaded)
  opened = jpeft.attach(loaded.model, method, loaded.variables, *args)
  trained, _ = tuned.split(theta)
  jax.tree.map(np.testing.assert_array_equal, opened.split(again)[0], trained)
  np.testing.assert_allclose(
    jax.jit(opened.apply)(again, loaded.variables, *args),
    jax.jit(tuned.apply)(theta, loaded.variables, *args),
    atol=1e-6,
  )


def test_ranks_that_differ_are_told_by_patterns(bert, tmp_path):
  loaded, args = bert()
  method = jpeft.chain(
    jpeft.loha(2, 3, '{q}'), jpeft.loha(3, 3, 'encoder/block_1/attention/value', name='v')
  )
  tuned = jpeft.attach(loaded.model, method, loaded.variables, *args)
  theta = noisy(jax.jit(tuned.init)(jax.random.key(0), loaded.variables))
  jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned)
  config = json.loads((tmp_path / CONFIG).read_text())
  assert config['rank_pattern'] == {'bert.encoder.layer.1.attention.self.value': 3}
  method, again = jpeft.load_adapter(tmp_path, loaded)
  assert again.keys() == {'loha', 'loha_2'}
  opened = jpeft.attach(loaded.model, method, loaded.variables, *args)
  np.testing.assert_allclose(
    jax.jit(opened.apply)(again, loaded.variables, *args),
    jax.jit(tuned.apply)(theta, loaded.variables, *args),
    atol=1e-6,
  )


@pytest.mark.parametrize('case,lost', (('vblora', 'vector_bank'), ('randlora', 'randlora_B')))
def test_what_kernels_share_must_be_in_the_folder_and_one(case, lost, bert, tmp_path):
  loaded, args, _, _ = written(case, bert, tmp_path / 'right')
  tensors = load_file(tmp_path / 'right' / FILE)
  (tmp_path / CONFIG).write_text((tmp_path / 'right' / CONFIG).read_text())
  save_file({name: x for name, x in tensors.items() if lost not in name}, tmp_path / FILE)
  with pytest.raises(ValueError, match=f'lacks base_model.*{lost}, which all kernels of'):
    jpeft.load_adapter(tmp_path, loaded)
  name = next(name for name in tensors if lost in name)
  copy = name.replace('base_model', QUERY)
  save_file(tensors | {copy: tensors[name] + 1}, tmp_path / FILE)
  with pytest.raises(ValueError, match='differs from that of other kernels'):
    jpeft.load_adapter(tmp_path, loaded)

  makes = {'vblora': lambda i: {'std': 0.1 + i}, 'randlora': lambda i: {'seed': i}}
  own = {'vblora': dict(vectors=5, length=4), 'randlora': {}}[case]
  factory = {'vblora': jpeft.vb_lora, 'randlora': jpeft.randlora}[case]
  method = jpeft.chain(
    *(
      factory(2, targets=role, name=role[1], **own, **makes[case](i))
      for i, role in enumerate(('{q}', '{v}'))
    )
  )
  tuned = jpeft.attach(loaded.model, method, loaded.variables, *args)
  theta = tuned.init(jax.random.key(0), loaded.variables)
  with pytest.raises(ValueError, match="several .* of different .*, of which 'v' is one"):
    jpeft.save_adapter(tmp_path / 'two', loaded, theta, tuned=tuned)


def test_eva_is_written_as_lora_of_its_ranks(bert, tmp_path):
  loaded, args = bert()
  batch = (tuple(args), np.zeros(len(args[0]), np.int32))
  method = jpeft.prepare(jpeft.eva(2, 3, '{q}|{fc1}'), loaded.model, loaded.variables, [batch])
  tuned = jpeft.attach(loaded.model, method, loaded.variables, *args)
  theta = noisy(jax.jit(tuned.init)(jax.random.key(0), loaded.variables))
  jpeft.save_adapter(tmp_path, loaded, theta, tuned=tuned)
  config = json.loads((tmp_path / CONFIG).read_text())
  ranks = {site: t['kernel']['a'].shape[1] for site, t in theta['eva'].items()}
  assert (
    config['peft_type'] == 'LORA' and sum(ranks.values()) == 2 * 4 and len({*ranks.values()}) > 1
  )
  for module, rank in config['rank_pattern'].items():  # one scale in all layers
    np.testing.assert_allclose(config['alpha_pattern'][module], rank * 3 / 2)
  method, again = jpeft.load_adapter(tmp_path, loaded)
  opened = jpeft.attach(loaded.model, method, loaded.variables, *args)
  np.testing.assert_allclose(
    jax.jit(opened.apply)(again, loaded.variables, *args),
    jax.jit(tuned.apply)(theta, loaded.variables, *args),
    atol=1e-6,
  )


def test_triplets_that_peft_left_out_are_zero(bert, tmp_path):
  loaded, _, _, theta = written('adalora', bert, tmp_path)
  tensors = load_file(tmp_path / FILE)
  cut = {'lora_A': np.s_[1:], 'lora_E': np.s_[1:], 'lora_B': np.s_[:, 1:]}
  for part, kept in cut.items():
    name = f'{QUERY}.{part}'
    tensors[name] = np.ascontiguousarray(tensors[name][kept])
  save_file(tensors, tmp_path / FILE)
  config = json.loads((tmp_path / CONFIG).read_text())
  config['rank_pattern'] = {f'{QUERY}.lora_E'.removeprefix('base_model.model.'): [False, True]}
  (tmp_path / CONFIG).write_text(json.dumps(config))
  _, again = jpeft.load_adapter(tmp_path, loaded)
  t = again['adalora']['encoder/block_1/attention/query']['kernel']
  of_file = theta['adalora']['encoder/block_1/attention/query']['kernel']
  assert t['e'][1] == 0 and t['e'][0] == of_file['e'][1]
  np.testing.assert_array_equal(t['a'][:, 0], of_file['a'][:, 1])


def test_what_such_a_folder_cannot_hold_is_told(bert, tmp_path):
  loaded, _, tuned, theta = written('loha', bert, tmp_path / 'right')
  with pytest.raises(ValueError, match='adapter folder holds LoRA or DoRA, or with tuned= one of'):
    jpeft.save_adapter(tmp_path / 'out', loaded, theta)
  tensors = load_file(tmp_path / 'right' / FILE)
  config = json.loads((tmp_path / 'right' / CONFIG).read_text())

  def refused(match, tensors=tensors, **fields):
    save_file(tensors, tmp_path / FILE)
    (tmp_path / CONFIG).write_text(json.dumps(config | fields))
    with pytest.raises(ValueError, match=match):
      jpeft.load_adapter(tmp_path, loaded)

  refused(r'hada_w1_a is \[16, 2\], here \[2, 16\].* has \[3, 16\]', r=3)
  refused('of LOHA, and adapter_config.json says LORA', peft_type='LORA', lora_alpha=4)
  name = f'{QUERY}.hada_w2_b'
  refused("query' lacks hada_w2_b", {key: x for key, x in tensors.items() if key != name})
