"""Which readers are given damaged files: a table of readers and valid files."""

import functools
import pathlib
import tarfile
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as numpy_files

from jpeft import config as config_lib
from jpeft import data, export, models, quant, training
from jpeft.data import text
from jpeft.models.io import gguf, onnx, safetensors, template_costs, tokenizer, vit_npz
from jpeft.models.io.tokenizer import load_tokenizer
from jpeft.training import by_label, confusion, metrics, pieces
from tests.fuzz import mutations, seeds
from tests.fuzz.reader import Files, Folder, Reader

TESTS = pathlib.Path(__file__).parents[1]
QUANTIZED = TESTS / 'quant' / 'golden' / 'bitsandbytes.npz'
ADAPTERS = TESTS / 'export' / 'golden'


# ---- Weights.


def _checkpoint(folder: Folder) -> None:
  opened = safetensors.Checkpoint(folder)
  for key in opened.shapes:
    opened.read(key)


def _npz(folder: Folder) -> None:
  opened = vit_npz.VitNpz(folder / 'vit.npz')
  assert opened.config
  for key in opened.shapes:
    opened.read(key)


def _gguf(folder: Folder) -> None:
  opened = gguf.Gguf(folder / 'model.gguf')
  assert opened.config
  for key in opened.shapes:
    opened.read(key)


def _gguf_tokenizer(folder: Folder) -> None:
  _used(load_tokenizer(folder / 'model.gguf'))


def _used(found: tokenizer.Tokenizer) -> None:
  found.decode(found.encode('ab cd ä 12', begin=True))
  if found.template:
    found.chat([{'role': 'user', 'content': 'ab'}], tools=[{'name': 'f'}])


def _index() -> list[Files]:
  index = {'weight_map': {'a': '1.safetensors', 'b': '2.safetensors'}}
  index['metadata'] = {'total_size': 8}
  return [
    {
      'model.safetensors.index.json': seeds.as_json(index),
      '1.safetensors': seeds.tensors(a=[1.0]),
      '2.safetensors': seeds.tensors(b=[2.0]),
    }
  ]


def _bitsandbytes(folder: Folder) -> None:
  tensors = safetensors.read_tensors(folder / 'q.safetensors')
  state = (folder / 'state.json').read_bytes()
  key = next((key for key in tensors if 'quant_state' in key), None)
  if key is not None:
    tensors[key] = np.frombuffer(state, np.uint8)
  quant.from_bitsandbytes(tensors, 'weight')


def _quantized() -> list[Files]:
  stored = np.load(QUANTIZED)
  found = []
  for prefix in ('rows/nf4/', 'short/fp4_double/'):
    names = [key for key in stored if key.startswith(prefix) and not key.endswith('read')]
    tensors = {key.removeprefix(prefix): stored[key] for key in names}
    state = next(x for key, x in tensors.items() if 'quant_state' in key)
    found.append({'q.safetensors': numpy_files.save(tensors), 'state.json': state.tobytes()})
  return found


# ---- Configs.


CONFIGS = (
  *('bert', 'roberta', 'distilbert', 'electra', 'mpnet', 'vit', 'deit', 'dinov2', 'beit', 'dinov3'),
  *('vit_mae', 't5', 'mt5', 'llama', 'llama_yarn', 'mistral', 'qwen2', 'qwen3'),
)


def _config(folder: Folder) -> None:
  config = models.read_json(folder / 'config.json')
  models.from_config(config)


def _described(folder: Folder) -> None:
  models.describe(folder)


def _images_config() -> list[Files]:
  colours = {'image_mean': [0.5, 0.5, 0.5], 'image_std': [0.5, 0.5, 0.5], 'size': {'height': 28}}
  return [
    {'config.json': seeds.golden('vit'), 'preprocessor_config.json': seeds.as_json(colours)},
    {'config.json': seeds.golden('bert')},
    {'config.json': seeds.golden('llama_yarn')},
    {'config.json': seeds.golden('t5')},
    {'config.json': seeds.golden('dinov3')},
  ]


# ---- Tokenizers.


def _tokenizer(folder: Folder) -> None:
  _used(load_tokenizer(folder))
  text.Encoder(folder / 'tokenizer.json', 16).encode('ab cd ä', 'a')


def _tokenizers() -> list[Files]:
  config = seeds.as_json(seeds.CONFIG)
  return [
    {'tokenizer.json': found, 'tokenizer_config.json': config} for found in seeds.tokenizers()
  ]


def _tokenizer_configs() -> list[Files]:
  found = seeds.tokenizers()[0]
  named = [{'name': 'default', 'template': seeds.TEMPLATE}, {'name': 'tool_use', 'template': 'x'}]
  return [
    {'tokenizer.json': found, 'tokenizer_config.json': seeds.as_json(seeds.CONFIG | more)}
    for more in ({'chat_template': seeds.TEMPLATE}, {'chat_template': named}, {'mask_token': 'a'})
  ]


def _chats(folder: Folder) -> None:
  """As `_tokenizer`, with a hundredth of the work that templates may do: what escapes the count
  takes as long as before, and what does not is soon over."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(template_costs, 'WORK', 10**5)
    _tokenizer(folder)


def _templates() -> list[Files]:
  found = seeds.tokenizers()[3]
  config = seeds.as_json(seeds.CONFIG)
  return [
    {
      'tokenizer.json': found,
      'tokenizer_config.json': config,
      'chat_template.jinja': template.encode(),
    }
    for template in (seeds.TEMPLATE, *mutations.TEMPLATES)
  ]


# ---- Runs.


def _run(folder: Folder) -> None:
  training.describe(folder)


def _runs() -> list[Files]:
  config = config_lib.load('quickstart', {})
  facts = {'labels': ['a', 'b'], 'backbone_sha256': 'x', 'facts': {}, 'imports': []}
  return [{'config.json': config_lib.to_json(config).encode(), 'run.json': seeds.as_json(facts)}]


def _logs(folder: Folder) -> None:
  metrics.read_metrics(folder / 'metrics.jsonl')
  confusion.confusion_section(folder)
  by_label.by_label_section(folder)


def _all_logs() -> list[Files]:
  rows = [{'step': i, 'split': 'train', 'loss': 0.5, 'time': {'at': 1.0}} for i in range(3)]
  scores = {'step': 3, 'labels': {'a': {'f1': 0.5, 'examples': 3}, 'b': {'f1': 0.5, 'examples': 1}}}
  counts = {'step': 3, 'labels': ['a', 'b'], 'confusion': [[1, 0], [2, 3]]}
  return [
    {
      'metrics.jsonl': seeds.lines(rows),
      'labels.json': seeds.as_json(scores),
      'confusion.json': seeds.as_json(counts),
    }
  ]


def _theta(folder: Folder) -> None:
  training.load_theta(folder / 'theta.safetensors', {'m': {'a': np.zeros(3, 'f')}})


def _thetas() -> list[Files]:
  arrays = {'m/a': np.zeros(3, 'f')}
  return [{'theta.safetensors': numpy_files.save(arrays, {'step': '3', 'method': '"m"'})}]


_STATE = {'a': np.arange(6, dtype='f'), 'b': np.zeros(3, 'i4')}


def _checkpoints(folder: Folder) -> None:
  opened = training.Checkpoints(folder / 'checkpoints', 1)
  try:
    if opened.latest is not None:
      opened.restore(jax.tree.map(jnp.asarray, _STATE))
  finally:
    opened.close()


def _stored_checkpoints() -> list[Files]:
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    opened = training.Checkpoints(root / 'checkpoints', 1)
    opened.save(3, _STATE, {'epoch': 1})
    opened.wait()
    whole = _read(root)
    state = jax.tree.map(jnp.asarray, _STATE)
    pieces.begun(root / 'checkpoints', 4)
    pieces.write(root / 'checkpoints', 4, 0, jax.tree.leaves(state))
    opened.finish_pieces(4, state, {'epoch': 1}, 1)
    opened.close()
    return [whole, _read(root)]


def _read(root: pathlib.Path) -> Files:
  files = [file for file in root.rglob('*') if file.is_file()]
  return {str(file.relative_to(root)): file.read_bytes() for file in files}


# ---- Adapters.


@functools.cache
def _bert() -> models.Pretrained:
  return models.load(seeds.GOLDEN / 'bert')


def _adapter(folder: Folder) -> None:
  export.load_adapter(folder, _bert())


def _adapters() -> list[Files]:
  layer = 'base_model.model.bert.encoder.layer.0.attention.self.query'
  width = _bert().config['hidden_size']
  factors = {
    f'{layer}.lora_A.weight': np.zeros((2, width)),
    f'{layer}.lora_B.weight': np.zeros((width, 2)),
  }
  config = {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 4, 'rank_pattern': {'query': 2}}
  config |= {'alpha_pattern': {}, 'bias': 'none', 'target_modules': ['query'], 'use_dora': False}
  lora = {
    'adapter_config.json': seeds.as_json(config),
    'adapter_model.safetensors': seeds.tensors(**factors),
  }
  folders = [ADAPTERS / 'adapters' / 'bert_seq', ADAPTERS / 'peft' / 'bert_prompts']
  names = ('adapter_config.json', 'adapter.safetensors', 'adapter_model.safetensors')
  return [
    lora,
    *(
      {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
      for folder in folders
    ),
  ]


# ---- Data.


def _data(spec: str, split: str = 'train+test', **options) -> Callable[[Folder], None]:
  def read(folder: Folder) -> None:
    source = data.load(spec.format(folder=folder), split, **options)
    for i in range(min(len(source), 8)):
      assert source[i] is not None

  return read


def _only(name: str, *contents: Callable[[], bytes]) -> Callable[[], list[Files]]:
  def kinds() -> list[Files]:
    return [{name: content()} for content in contents]

  return kinds


def _image(folder: Folder) -> None:
  data.decode(folder / 'image.png', str(folder / 'image.png'))


def _images() -> list[Files]:
  return [{'image.png': found} for found in seeds.images()]


def _csv() -> bytes:
  return b'text,label\n' + b''.join(b'"t, %d",%s\n' % (i, b'ab'[i % 2 :][:1]) for i in range(8))


def _conll() -> bytes:
  return b''.join(b'Jane B-PER\nruns O\n%d O\n\n' % i for i in range(4))


def _onnx(folder: Folder) -> None:
  onnx.read((folder / 'a.onnx').read_bytes(), 'a.onnx')


def _text_lines() -> bytes:
  return b''.join(b'line %d\n' % i for i in range(8))


_ALL = [
  Reader(
    'safetensors',
    _checkpoint,
    lambda: [{'model.safetensors': seeds.tensors(a=np.ones((2, 3)), b=[1.0])}],
    'model.safetensors',
  ),
  Reader('index of shards', _checkpoint, _index, fixed=('1.safetensors', '2.safetensors')),
  Reader('ONNX', _onnx, _only('a.onnx', seeds.onnx), 'a.onnx'),
  Reader('npz', _npz, _only('vit.npz', seeds.npz, seeds.compressed_npz), 'vit.npz', share=0.25),
  Reader('GGUF', _gguf, _only('model.gguf', seeds.gguf, seeds.gguf_by_scores), share=0.5),
  Reader('GGUF tokenizer', _gguf_tokenizer, _only('model.gguf', seeds.gguf, seeds.gguf_by_scores)),
  Reader('bitsandbytes', _bitsandbytes, _quantized, share=0.25),
  Reader('config.json', _config, lambda: [{'config.json': seeds.golden(n)} for n in CONFIGS]),
  Reader('config.json, traced', _described, _images_config, share=0.02),
  Reader('tokenizer.json', _tokenizer, _tokenizers, fixed=('tokenizer_config.json',)),
  Reader('tokenizer_config.json', _tokenizer, _tokenizer_configs, fixed=('tokenizer.json',)),
  Reader('chat template', _chats, _templates, fixed=('tokenizer.json', 'tokenizer_config.json')),
  Reader('run folder', _run, _runs, '/tmp'),  # of which the folder is named
  Reader('logs of runs', _logs, _all_logs, '.json'),
  Reader('theta', _theta, _thetas, 'theta.safetensors'),
  Reader('checkpoints', _checkpoints, _stored_checkpoints, share=0.05),
  Reader('adapters', _adapter, _adapters, share=0.1),
  Reader('images', _image, _images, 'image.png'),
  Reader('CSV', _data('csv:{folder}/a.csv'), _only('a.csv', _csv)),
  Reader(
    'JSON lines',
    _data('jsonl:{folder}/a.jsonl'),
    _only('a.jsonl', lambda: seeds.lines(seeds.LINES)),
  ),
  Reader(
    'chats',
    _data('completions:{folder}/a.jsonl'),
    _only('a.jsonl', lambda: seeds.lines(seeds.CHATS)),
  ),
  Reader(
    'preferences',
    _data('preferences:{folder}/a.jsonl', labels='preferences'),
    _only('a.jsonl', lambda: seeds.lines(seeds.PREFERENCES)),
  ),
  Reader(
    'GLUE',
    _data('glue:{folder}?task=rte', split='train'),
    _only('train.tsv', lambda: seeds.RTE),
  ),
  Reader(
    'SQuAD',
    _data('squad:{folder}/a.json', labels='answers'),
    _only('a.json', lambda: seeds.as_json(seeds.SQUAD)),
  ),
  Reader('CoNLL', _data('conll:{folder}/a.conll', labels='tags'), _only('a.conll', _conll)),
  Reader('text', _data('text:{folder}/a.txt', labels='nothing'), _only('a.txt', _text_lines)),
  Reader(
    'Parquet',
    _data('parquet:{folder}/a.parquet'),
    _only('a.parquet', functools.partial(seeds.table, 'parquet')),
  ),
  Reader(
    'Arrow',
    _data('arrow:{folder}/a.arrow'),
    _only(
      'a.arrow', functools.partial(seeds.table, 'arrow'), functools.partial(seeds.table, 'stream')
    ),
  ),
  Reader(
    'tar',
    _data('wds:{folder}/a.tar?label=cls'),
    _only('a.tar', seeds.tar, functools.partial(seeds.tar, tarfile.GNU_FORMAT)),
  ),
]
READERS = {reader.name: reader for reader in _ALL}
