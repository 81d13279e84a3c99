"""Reads the files that make_peft_golden.py wrote, and turns what they hold into the layout of Flax.

torch keeps W [out, in] and images [B, C, H, W]; Flax keeps W transposed and images [B, H, W, C].
"""

import functools
import json
import re
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

import jpeft
from tests.fixtures.nnx_models import Llama

HERE = Path(__file__).parent
# Names of our BERT, by those of transformers; the rest of a path stays as it is.
BERT = (
  (r'bert\.embeddings\.word_embeddings', 'embed/word'),
  (r'bert\.encoder\.layer\.(\d+)\.attention\.self\.(\w+)', r'encoder/block_\1/attention/\2'),
  (r'bert\.encoder\.layer\.(\d+)\.attention\.output\.dense', r'encoder/block_\1/attention/out'),
  (r'bert\.encoder\.layer\.(\d+)\.intermediate\.dense', r'encoder/block_\1/mlp/fc1'),
  (r'bert\.encoder\.layer\.(\d+)\.output\.dense', r'encoder/block_\1/mlp/fc2'),
)
LLAMA = ((r'model\.layers\.(\d+)\.(\w+)\.(\w+)', r'layers/\1/\2/\3'),)


@functools.cache
def read(file: str, case: str) -> dict:
  """What a file holds of one case: {key: array}, or one dict deeper for start/, adapter/, grad/,
  weights/.
  """
  out: dict = {}
  with np.load(HERE / f'{file}.npz') as stored:
    for key in stored.files:
      head, _, rest = key.partition('/')
      group, _, name = rest.partition('/')
      if head == case and name:
        out.setdefault(group, {})[name] = stored[key]
      elif head == case:
        out[group] = stored[key]
  return out


def layer(case: str):
  """(module, variables, x, y) of a case of peft_layers: a layer, and y as peft gives it with the
  adapter.
  """
  held = read('peft_layers', case)
  x, y, weight = held['x'], held['y'], held['weight']
  if case.startswith('table'):
    return nn.Embed(*weight.shape), {'params': {'embedding': weight}}, x, y
  kernel = {'kernel': np.moveaxis(weight, (0, 1), (-1, -2)), 'bias': held['bias']}
  if case.startswith('linear'):
    return nn.Dense(len(weight)), {'params': kernel}, x, y
  last = lambda image: np.moveaxis(image, 1, -1)
  return nn.Conv(len(weight), (3, 2), (2, 1), 1), {'params': kernel}, last(x), last(y)


def kernels(tensors: dict, rows=(('layer', ''),), array: str = 'kernel') -> dict:
  """theta of LoRA and DoRA, {site path: {array: {a, b, m}}}, from a peft adapter.

  Args:
    tensors: {peft key: array}.
    rows: (regex of the module paths of the torch model, path of the site).
    array: the name of the array that is adapted.
  """
  theta: dict = {}
  for key, x in tensors.items():
    if key.endswith('base_layer.weight'):  # peft stores an adapted table too
      continue
    module, what = re.fullmatch(r'(.*)\.lora_(\w+)(?:\.weight)?', key).groups()
    entry = theta.setdefault(_path(module, rows), {}).setdefault(array, {})
    if what == 'magnitude_vector':
      entry['m'] = x.reshape(-1)
    elif what.endswith('A'):  # [r, in, *window] -> [*window and in, r]
      entry['a'] = np.moveaxis(x, (0, 1), (-1, -2)).reshape(-1, len(x))
    else:
      entry['b'] = x.reshape(x.shape[:2]).T
  return theta


def vectors(tensors: dict, rows=(('layer', ''),)) -> dict:
  """theta of (IA)^3, {site path: {'kernel': l}}, from a peft adapter; see `kernels`."""
  return {
    _path(key.removesuffix('.ia3_l'), rows): {'kernel': x.reshape(-1)} for key, x in tensors.items()
  }


def scales(tensors: dict, rows) -> dict:
  """theta of VeRA, {site path: {'kernel': {d, e}}}, from a peft adapter; see `kernels`."""
  theta: dict = {}
  for key, x in tensors.items():
    module, _, what = key.rpartition('.vera_lambda_')
    if module:
      theta.setdefault(_path(module, rows), {'kernel': {}})['kernel'][
        {'d': 'd', 'b': 'e'}[what]
      ] = x
  return theta


def _path(module: str, rows) -> str:
  found = [re.sub(pattern, path, module) for pattern, path in rows if re.fullmatch(pattern, module)]
  return found[0]


def bert(folder: Path, **fields):
  """(model, variables, args) of the BERT that the cases 'bert_...' adapt; `folder` is written
  to.
  """
  held = read('peft_models', 'bert')
  save_file(held['weights'], folder / 'model.safetensors')
  (folder / 'config.json').write_text(str(held['config']))
  loaded = jpeft.load(folder, **fields)
  return loaded.model, loaded.variables, (held['input_ids'], held['attention_mask'])


def llama():
  """(model, state, args) of somebody's NNX model, with the weights that the cases 'llama_...'
  adapt.
  """
  held, model = read('peft_models', 'llama'), Llama(width=16, vocab=24, rngs=nnx.Rngs(0))
  config = json.loads(str(held['config']))
  assert [config[k] for k in ('num_attention_heads', 'num_key_value_heads', 'rms_norm_eps')] == [
    4,
    2,
    1e-6,
  ]
  state = nnx.to_flat_state(nnx.state(model))
  names = {
    'embedder/embedding': 'embed_tokens.weight',
    'final_norm/scale': 'norm.weight',
    'lm_head/kernel': 'lm_head.weight',
  }

  def value(path, old):
    name = '/'.join(map(str, path))
    name = names.get(name, name.rpartition('/')[0].replace('/', '.') + '.weight')
    weight = held['weights'][name if name == 'lm_head.weight' else f'model.{name}']
    weight = weight.T if path[-1] == 'kernel' else weight
    return old.replace(jnp.asarray(weight.reshape(old.shape)))

  return (
    model,
    nnx.from_flat_state([(path, value(path, old)) for path, old in state]),
    (held['input_ids'],),
  )
