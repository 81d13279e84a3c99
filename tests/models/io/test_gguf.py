"""GGUF: formats, whole models, tokenizers, files that are wrong, and the packaged SmolLM2."""

import itertools
import json
import struct
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpeft import models
from jpeft.decoding import generate
from jpeft.models.io.gguf import FORMATS, Gguf
from jpeft.models.io.tokenizer import load_tokenizer, save_tokenizer
from jpeft.models.nn import Rope
from tests.models.goldens import GOLDEN
from tests.models.io.test_files import same, tensors

TEXT = lambda s: struct.pack('<Q', len(s.encode())) + s.encode()
KIND = {bool: 7, int: 4, float: 6, str: 8}
CODE = {bool: '<?', int: '<I', float: '<f'}
NAMES = {
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'lm_head': 'output',
  'input_layernorm': 'attn_norm',
  'post_attention_layernorm': 'ffn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'self_attn.q_norm': 'attn_q_norm',
  'self_attn.k_norm': 'attn_k_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}


def value(x):
  """(type, bytes) of a metadata value."""
  if isinstance(x, list):
    parts = [value(y) for y in x]
    return 9, struct.pack('<IQ', parts[0][0], len(x)) + b''.join(data for _, data in parts)
  return KIND[type(x)], TEXT(x) if isinstance(x, str) else struct.pack(CODE[type(x)], x)


def gguf_file(metadata, arrays, kind=0):
  """The bytes of a GGUF file with float32 tensors."""
  stored = {name: (kind, x.shape, x.astype('<f4').tobytes()) for name, x in arrays.items()}
  return packed_file(metadata, stored)


def packed_file(metadata, tensors):
  """The bytes of a GGUF file with tensors {name: (type, shape, bytes)}."""
  head, data = [], b''
  for name, (kind, shape, stored) in tensors.items():
    head += [
      TEXT(name),
      struct.pack(f'<I{len(shape)}QIQ', len(shape), *shape[::-1], kind, len(data)),
    ]
    data += stored + bytes(-len(stored) % 32)
  pairs = [TEXT(k) + struct.pack('<I', value(v)[0]) + value(v)[1] for k, v in metadata.items()]
  whole = b'GGUF' + struct.pack('<IQQ', 3, len(tensors), len(pairs)) + b''.join([*pairs, *head])
  return whole + bytes(-len(whole) % 32) + data


def metadata(kind, config, **more):
  told = {
    'block_count': 'num_hidden_layers',
    'context_length': 'max_position_embeddings',
    'embedding_length': 'hidden_size',
    'feed_forward_length': 'intermediate_size',
    'attention.head_count': 'num_attention_heads',
    'attention.head_count_kv': 'num_key_value_heads',
    'attention.key_length': 'head_dim',
    'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
  }
  return {
    'general.architecture': kind,
    **{f'{kind}.{k}': config[v] for k, v in told.items()},
    f'{kind}.rope.freq_base': float(config['rope_parameters']['rope_theta']),
    **more,
  }


def convert(name, kind, permute=lambda part, x: x, **more):
  """A golden folder as a GGUF file."""
  config = json.loads((GOLDEN / name / 'config.json').read_text())
  return gguf_file(metadata(kind, config, **more), arrays_of(name, permute))


def arrays_of(name, permute=lambda part, x: x):
  """The arrays of a golden folder by their names in GGUF."""
  arrays = {}
  for key, array in tensors(GOLDEN / name).items():
    stem, _, leaf = key.rpartition('.')
    if stem.startswith('model.layers.'):
      number, part = stem.removeprefix('model.layers.').split('.', 1)
      arrays[f'blk.{number}.{NAMES[part]}.{leaf}'] = permute(part, array)
    else:
      arrays[f'{NAMES[stem]}.{leaf}'] = array
  return arrays


def test_formats_are_read_bit_by_bit():
  file, want = Gguf(GOLDEN / 'formats.gguf'), np.load(GOLDEN / 'formats.npz')
  assert set(file.shapes) == set(want) == {'F32', 'F16', 'BF16', 'Q4_0', 'Q4_1', 'Q8_0'}
  for name in want:
    got = file.tensor(name)
    assert (
      got.dtype == np.float32
      and got.shape == file.shapes[name] == (5, 96)
      and np.abs(got).max() > 5
    )
    np.testing.assert_array_equal(got.view(np.uint32), want[name].astype('float32').view(np.uint32))
  assert (
    file.metadata['some.numbers'],
    file.metadata['some.float'],
    file.metadata['some.flag'],
  ) == ([3, 1, 2], 0.25, True)


def test_a_model_is_the_one_of_the_safetensors_folder(tmp_path):
  (tmp_path / 'tiny.gguf').write_bytes(convert('qwen3', 'qwen3'))
  loaded = models.load(tmp_path / 'tiny.gguf', scan=True)
  want = models.load(GOLDEN / 'qwen3', scan=True)
  same(loaded.variables, want.variables)
  assert loaded.model == want.model
  assert loaded.tokenizer == str(tmp_path / 'tiny.gguf') and set(loaded.files) == {'tiny.gguf'}
  models.save_pretrained(tmp_path / 'saved', loaded.model, loaded.variables, loaded.config)
  same(tensors(tmp_path / 'saved'), tensors(GOLDEN / 'qwen3'))


def test_the_row_order_of_llama_files_is_undone(tmp_path):
  """Written feature by feature: row 2 i + j of a head on disk is row i + j * size / 2 of ours."""

  def permute(part, x):
    if part not in ('self_attn.q_proj', 'self_attn.k_proj'):
      return x
    out = np.empty_like(x)
    for head in range(len(x) // 6):
      for i in range(3):
        for j in range(2):
          out[6 * head + 2 * i + j] = x[6 * head + i + 3 * j]
    return out

  (tmp_path / 'tiny.gguf').write_bytes(convert('mistral', 'llama', permute))
  loaded = models.load(tmp_path / 'tiny.gguf')
  same(loaded.variables, models.load(GOLDEN / 'mistral').variables)


def test_the_original_context_of_yarn_is_read(tmp_path):
  scaling = {'type': 'yarn', 'factor': 4.0, 'original_context_length': 16}
  more = {f'qwen3.rope.scaling.{name}': value for name, value in scaling.items()}
  (tmp_path / 'tiny.gguf').write_bytes(convert('qwen3', 'qwen3', **more))
  rope = models.load(tmp_path / 'tiny.gguf').model.rope
  assert (rope.scaling, rope.factor, rope.original) == ('yarn', 4.0, 16)
  assert rope.magnitude == pytest.approx(0.1 * np.log(4) + 1)


@pytest.mark.parametrize('wrong', (False, True))
def test_the_factors_of_rotary_positions_are_those_of_llama_3(wrong, tmp_path):
  """As the writer of such files makes them, feature by feature; here for heads of 6 features."""
  config = json.loads((GOLDEN / 'qwen3' / 'config.json').read_text())
  told = metadata('qwen3', config) | {'qwen3.rope.freq_base': 500000.0}
  factors = []
  for i in range(3):
    wavelength = 2 * np.pi * 500000.0 ** (2 * i / 6)
    if wavelength < 8192 / 4:
      factors.append(1.0)
    elif wavelength > 8192:
      factors.append(32.0)
    else:
      fast = (8192 / wavelength - 1) / 3
      factors.append(1 / ((1 - fast) / 32 + fast))
  assert factors[0] == 1 and factors[2] == 32
  if wrong:
    factors[0] = 3
  (tmp_path / 'tiny.gguf').write_bytes(
    gguf_file(told, {**arrays_of('qwen3'), 'rope_freqs.weight': np.array(factors)})
  )
  if wrong:
    with pytest.raises(ValueError, match="'rope_freqs.weight' has other factors than Llama 3"):
      models.load(tmp_path / 'tiny.gguf')
    return
  rope = models.load(tmp_path / 'tiny.gguf').model.rope
  assert rope == Rope(500000.0, 'llama3', 32.0, 1.0, 4.0, 8192)


DATA = convert('qwen3', 'qwen3')


@pytest.mark.parametrize(
  'change,message',
  (
    (lambda d: d[:-40], r'ends at byte \d+ of \d+'),
    (lambda d: d[:200], 'is no readable GGUF file'),
    (lambda d: b'', 'is no readable GGUF file'),
    (lambda d: b'GGML' + d[4:], r"begins with b'GGML'"),
    (lambda d: d[:4] + struct.pack('<I', 1) + d[8:], r'version 1 is none of \(2, 3\)'),
    (lambda d: d[:8] + struct.pack('<Q', 2**60) + d[16:], 'is no readable GGUF file'),
    (
      lambda d: d.replace(
        TEXT('general.architecture'), struct.pack('<Q', 2**62) + b'general.architecture'
      ),
      r'a text of 4611686018427387904 bytes',
    ),
    (
      lambda d: d.replace(struct.pack('<2Q', 24, 60), struct.pack('<2Q', 24, 2**40), 1),
      r'ends at byte \d+ of',
    ),
  ),
  ids=('short', 'header', 'empty', 'magic', 'version', 'count', 'text', 'shape'),
)
def test_damaged_files_are_named(change, message, tmp_path):
  file = tmp_path / 'tiny.gguf'
  file.write_bytes(change(DATA))
  assert file.read_bytes() != DATA
  with pytest.raises(
    ValueError,
    match=f'tiny.gguf is no readable GGUF file.*{message}'
    if 'no read' not in message
    else f'tiny.gguf {message}',
  ):
    models.load(file)


@pytest.mark.parametrize(
  'data,message',
  (
    (
      gguf_file({'general.architecture': 'llama'}, {'w': np.zeros((2, 32))}, kind=99),
      r"tiny.gguf: 'w' has the type 99, which is not supported; supported are F32 \(0\)",
    ),
    (
      gguf_file({'general.architecture': 'mamba'}, {'w': np.zeros((2, 32))}),
      "architecture 'mamba' is none of llama",
    ),
    (
      gguf_file({'general.architecture': 'llama'}, {'w': np.zeros((2, 32))}),
      "has no 'llama.attention.head_count'",
    ),
    (
      gguf_file({'general.architecture': 'llama'}, {'w': np.zeros((2, 30))}, kind=2),
      'cannot be cut into Q4_0 blocks',
    ),
    (
      gguf_file({'general.architecture': 'llama'}, {'w': np.zeros((2, 128))}, kind=14),
      r"tiny.gguf .*'w' of shape \[2, 128\] cannot be cut into Q6_K blocks of 256",
    ),
    (
      packed_file({'general.architecture': 'llama'}, {'w': (13, (2, 256), bytes(300))}),
      r"tiny.gguf .*'w' ends at byte \d+ of \d+",
    ),
  ),
)
def test_what_is_not_supported_is_named(data, message, tmp_path):
  (tmp_path / 'tiny.gguf').write_bytes(data)
  with pytest.raises(ValueError, match=message):
    models.load(tmp_path / 'tiny.gguf')


def random_blocks(form, count, rng):
  """Blocks of random codes and finite scales: in no byte the highest bit of an exponent is set."""
  return (rng.integers(0, 256, (count, form.bytes)) & 0xBF).astype(np.uint8)


def packed_qwen2(kinds):
  """(bytes of a file, {key of Hugging Face: (type, shape, bytes)}) of a model in these types."""
  config = json.loads((GOLDEN / 'qwen2' / 'config.json').read_text()) | {
    'hidden_size': 256,
    'intermediate_size': 512,
    'head_dim': 64,
    'num_hidden_layers': 4,
  }
  rng = np.random.default_rng(0)
  shapes = {'token_embd': (20, 256)}
  for i in range(4):
    shapes |= {
      f'blk.{i}.attn_q': (256, 256),
      f'blk.{i}.attn_k': (128, 256),
      f'blk.{i}.attn_v': (128, 256),
      f'blk.{i}.attn_output': (256, 256),
      f'blk.{i}.ffn_gate': (512, 256),
      f'blk.{i}.ffn_up': (512, 256),
      f'blk.{i}.ffn_down': (256, 512),
    }
  stored = {}
  for number, (name, shape) in enumerate(shapes.items()):
    kind = kinds[number % len(kinds)]
    form = FORMATS[kind]
    blocks = random_blocks(form, shape[0] * shape[1] // form.weights, rng)
    stored[f'{name}.weight'] = kind, shape, blocks.tobytes()
  plain = {'output_norm.weight': (256,)}
  for i in range(4):
    plain |= {f'blk.{i}.attn_norm.weight': (256,), f'blk.{i}.ffn_norm.weight': (256,)}
    plain |= {f'blk.{i}.attn_q.bias': (256,)}
    plain |= {f'blk.{i}.attn_k.bias': (128,), f'blk.{i}.attn_v.bias': (128,)}
  for name, shape in plain.items():
    stored[name] = 0, shape, rng.normal(size=shape).astype('<f4').tobytes()
  return packed_file(metadata('qwen2', config), stored), stored


def test_every_format_of_the_package_is_read_into_a_model(tmp_path, monkeypatch):
  """What the package reads in whole tensors, whatever pieces they are decoded in."""
  gguf = pytest.importorskip('gguf')
  monkeypatch.setattr('jpeft.models.io.gguf._PIECE', 2**13)
  for kind, form in FORMATS.items():
    assert (form.weights, form.bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    assert form.name == gguf.GGMLQuantizationType(kind).name
  kinds = [kind for kind, form in FORMATS.items() if form.weights > 1 and form.name != 'Q8_K']
  assert len(kinds) == 22
  data, stored = packed_qwen2(kinds)
  (tmp_path / 'tiny.gguf').write_bytes(data)
  params = models.load(tmp_path / 'tiny.gguf').variables['params']
  places = {
    'attn_q': ('attention', 'query'),
    'attn_k': ('attention', 'key'),
    'attn_v': ('attention', 'value'),
    'attn_output': ('attention', 'out'),
    'ffn_gate': ('mlp', 'gate'),
    'ffn_up': ('mlp', 'fc1'),
    'ffn_down': ('mlp', 'fc2'),
  }
  seen = set()
  for name, (kind, shape, raw) in stored.items():
    if kind == 0:
      continue
    raw = np.frombuffer(raw, np.uint8).reshape(shape[0], -1)
    want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind))
    assert want.shape == shape and np.isfinite(want).all() and np.ptp(want) > 0, name
    _, number, part, *_ = f'{name}...'.split('.')
    if name.startswith('blk'):
      module, layer = places[part]
      got = params['decoder'][f'block_{number}'][module][layer]['kernel'].T
    else:
      got = params['embed']['embedding']
    np.testing.assert_array_equal(got, want, err_msg=name)
    seen.add(kind)
  assert seen == set(kinds)


@pytest.mark.parametrize('name', ('Q5_0', 'Q5_1'))
def test_what_was_quantized_comes_back_near(name, tmp_path):
  gguf = pytest.importorskip('gguf')
  kind = gguf.GGMLQuantizationType[name]
  want = np.random.default_rng(0).normal(size=(3, 64)).astype('f')
  data = packed_file({}, {'w': (int(kind), want.shape, gguf.quants.quantize(want, kind).tobytes())})
  (tmp_path / 'tiny.gguf').write_bytes(data)
  got = Gguf(tmp_path / 'tiny.gguf').tensor('w')
  assert 0 < np.abs(got - want).max() < 0.15


def test_blocks_of_k_with_codes_of_8_bits(tmp_path):
  rng = np.random.default_rng(0)
  scales = rng.normal(size=(2, 1)).astype('<f4')
  codes = rng.integers(-128, 128, (2, 256)).astype(np.int8)
  blocks = [
    scale.tobytes() + code.tobytes() + bytes(32) for scale, code in zip(scales, codes, strict=True)
  ]
  (tmp_path / 'tiny.gguf').write_bytes(packed_file({}, {'w': (15, (2, 256), b''.join(blocks))}))
  np.testing.assert_array_equal(Gguf(tmp_path / 'tiny.gguf').tensor('w'), scales * codes)


def test_a_format_of_the_package_needs_it(tmp_path, monkeypatch):
  gguf = pytest.importorskip('gguf')
  form = FORMATS[14]
  stored = {'w': (14, (1, 256), bytes(form.bytes)), 'v': (8, (1, 32), bytes(34))}
  (tmp_path / 'tiny.gguf').write_bytes(packed_file({}, stored))
  monkeypatch.setitem(sys.modules, 'gguf', None)
  file = Gguf(tmp_path / 'tiny.gguf')
  assert not file.tensor('v').any()
  with pytest.raises(
    ModuleNotFoundError, match=r"needs the package gguf: pip install 'jpeft\[gguf\]'"
  ):
    file.tensor('w')
  old = types.SimpleNamespace(GGMLQuantizationType={}, quants=gguf.quants)
  monkeypatch.setitem(sys.modules, 'gguf', old)
  with pytest.raises(ValueError, match="tiny.gguf: 'w' is stored as Q6_K, and the installed pack"):
    file.tensor('w')


TOKENS = ['<|end|>', '<|start|>', 'h', 'i', '1', 'Ġ', 'hi', 'Ġhi', 'Ċ']
TOKENIZER = {
  'tokenizer.ggml.model': 'gpt2',
  'tokenizer.ggml.pre': 'smollm',
  'tokenizer.ggml.tokens': TOKENS,
  'tokenizer.ggml.token_type': [3, 3, 1, 1, 1, 1, 1, 1, 1],
  'tokenizer.ggml.merges': ['h i', 'Ġ hi'],
  'tokenizer.ggml.eos_token_id': 0,
  'tokenizer.chat_template': "{% for m in messages %}<|start|>{{ m['content'] }}"
  '{{ eos_token }}{% endfor %}'
  '{% if add_generation_prompt %}<|start|>{% endif %}'
  "{% if not messages %}{{ raise_exception('nothing said') }}{% endif %}",
}


def test_a_tokenizer_is_read_from_metadata(tmp_path):
  pytest.importorskip('tokenizers')
  file = tmp_path / 'tiny.gguf'
  file.write_bytes(
    gguf_file({'general.architecture': 'llama', **TOKENIZER}, {'w': np.zeros((2, 32))})
  )
  tokenizer = load_tokenizer(file)
  for reader in (tokenizer, save_tokenizer(tokenizer, tmp_path) or load_tokenizer(tmp_path)):
    assert reader.encode('hi hi 11') == [6, 7, 5, 4, 4]
    assert (reader.eos, reader.bos, reader.pad) == (0, None, 0)
    chat = reader.chat([{'role': 'user', 'content': 'hi'}])
    assert chat == '<|start|>hi<|end|><|start|>' and reader.encode(chat) == [1, 6, 0, 1]
    assert reader.decode([1, 6, 7, 0]) == 'hi hi'
    with pytest.raises(ValueError, match='the chat template refuses the messages: nothing said'):
      reader.chat([])


def test_tokenizers_that_cannot_serve_are_refused(tmp_path):
  pytest.importorskip('tokenizers')
  file = tmp_path / 'tiny.gguf'

  def written(**change):
    held = {k: v for k, v in (TOKENIZER | change).items() if v is not None}
    file.write_bytes(gguf_file({'general.architecture': 'llama', **held}, {'w': np.zeros((2, 32))}))
    return file

  with pytest.raises(ValueError, match='tiny.gguf names no end-of-text token'):
    load_tokenizer(written(**{'tokenizer.ggml.eos_token_id': None}))
  with pytest.raises(
    ValueError,
    match="'bert' with the splitting 'smollm' is not supported, only 'llama', and 'gpt2'",
  ):
    load_tokenizer(written(**{'tokenizer.ggml.model': 'bert'}))
  with pytest.raises(ValueError, match="'gpt2' with the splitting 'viking' is not supported"):
    load_tokenizer(written(**{'tokenizer.ggml.pre': 'viking'}))
  with pytest.raises(
    ValueError, match="tiny.gguf: its tokenizer 'llama' has no tokenizer.ggml.sco"
  ):
    load_tokenizer(written(**{'tokenizer.ggml.model': 'llama'}))
  with pytest.raises(ValueError, match="its tokenizer 'gpt2' has no tokenizer.ggml.merges"):
    load_tokenizer(written(**{'tokenizer.ggml.merges': None}))
  with pytest.raises(ValueError, match='token_type has 1 entries for 9 tokens'):
    load_tokenizer(written(**{'tokenizer.ggml.token_type': [1]}))
  with pytest.raises(ValueError, match="the merge 'h x' of its tokenizer is none of two tokens"):
    load_tokenizer(written(**{'tokenizer.ggml.merges': ['h i', 'h x']}))
  with pytest.raises(ValueError, match='has no chat template'):
    load_tokenizer(written(**{'tokenizer.chat_template': None})).chat(
      [{'role': 'user', 'content': 'hi'}]
    )


def test_a_text_begins_as_the_model_is_used_to(tmp_path):
  pytest.importorskip('tokenizers')
  file = tmp_path / 'tiny.gguf'
  for begins in (True, False):
    told = TOKENIZER | {'tokenizer.ggml.bos_token_id': 1, 'tokenizer.ggml.add_bos_token': begins}
    file.write_bytes(gguf_file({'general.architecture': 'llama', **told}, {'w': np.zeros((2, 32))}))
    tokenizer = load_tokenizer(file)
    for reader in (tokenizer, save_tokenizer(tokenizer, tmp_path) or load_tokenizer(tmp_path)):
      assert reader.encode('hi') == [6] and reader.encode('hi', begin=True) == [
        *([1] if begins else []),
        6,
      ]


MADE = json.loads((GOLDEN / 'gguf_tokenizers.json').read_text(encoding='utf-8'))


def tokenizer_of(folder, model, told, **more):
  """The tokenizer of a file with such metadata."""
  named = {'model': model, **told, **more}
  keys = {f'tokenizer.ggml.{name}': value for name, value in named.items()}
  (folder / 'tiny.gguf').write_bytes(gguf_file(keys, {'w': np.zeros((2, 32))}))
  return load_tokenizer(folder / 'tiny.gguf')


@pytest.mark.parametrize('pre', ('gpt-2', 'qwen2', 'llama-bpe', 'tekken'))
def test_byte_pairs_are_those_of_transformers(pre, tmp_path):
  """Of texts with numbers, contractions, spaces, lines, accents, CJK, emoji and special tokens."""
  pytest.importorskip('tokenizers')
  tokenizer = tokenizer_of(tmp_path, 'gpt2', MADE['merges']['told'], pre=pre)
  want = MADE['merges'][pre]
  for text, ids, decoded in zip(MADE['inputs'], want['ids'], want['texts'], strict=True):
    assert tokenizer.encode(text) == ids, text
    assert tokenizer.decode(ids) == decoded
  every = [MADE['merges'][other]['ids'] for other in ('gpt-2', 'qwen2', 'llama-bpe', 'tekken')]
  assert every.count(want['ids']) == 1  # the texts tell them apart


def test_pieces_by_scores_are_those_of_transformers(tmp_path):
  pytest.importorskip('tokenizers')
  made = MADE['scores']
  tokenizer = tokenizer_of(tmp_path, 'llama', made['told'])
  want = made['llama']
  for text, ids in zip(made['inputs'], want['ids'], strict=True):
    assert tokenizer.encode(text) == ids, text
    assert tokenizer.encode(text, begin=True) == [1, *ids]
  again = save_tokenizer(tokenizer, tmp_path) or load_tokenizer(tmp_path)
  for text, ids, decoded in zip(made['inputs'], want['ids'], want['texts'], strict=True):
    assert again.encode(text) == ids and again.decode(ids) == decoded


def merged_by_scores(text, tokens, scores, types):
  """Pieces of a text by definition: the neighbours with the highest score merge, the first of them
  where there are several; what has no piece becomes its bytes.
  """
  score_of = {t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind == 1}
  parts = list('\u2581' + text.replace(' ', '\u2581'))
  while True:
    found = [
      (score_of[a + b], -i)
      for i, (a, b) in enumerate(itertools.pairwise(parts))
      if a + b in score_of
    ]
    if not found:
      break
    i = -max(found)[1]
    parts[i : i + 2] = [parts[i] + parts[i + 1]]
  ids = []
  for part in parts:
    if part in score_of:
      ids.append(tokens.index(part))
    else:
      ids += [tokens.index(f'<0x{byte:02X}>') for byte in part.encode()]
  return ids


def test_neighbours_with_the_highest_score_merge_first(tmp_path):
  pytest.importorskip('tokenizers')
  told = MADE['scores']['told']
  tokenizer = tokenizer_of(tmp_path, 'llama', told)
  rng = np.random.default_rng(0)
  letters = list('theandworlsy  .,éń世')
  for _ in range(50):
    text = ''.join(rng.choice(letters, rng.integers(1, 40)))
    want = merged_by_scores(text, told['tokens'], told['scores'], told['token_type'])
    assert tokenizer.encode(text) == want, text


def test_what_is_unknown_has_a_token_or_bytes(tmp_path):
  pytest.importorskip('tokenizers')
  told = {
    'tokens': ['</s>', '<unk>', '\u2581', 'a'],
    'scores': [0.0, 0.0, 0.0, 0.0],
    'token_type': [3, 2, 1, 1],
    'eos_token_id': 0,
  }
  assert tokenizer_of(tmp_path, 'llama', told).encode('aba') == [2, 3, 1, 3]
  with pytest.raises(ValueError, match='neither a token for what is unknown nor all bytes'):
    tokenizer_of(tmp_path, 'llama', told | {'token_type': [3, 1, 1, 1]})


def test_a_file_may_say_how_a_text_begins(tmp_path):
  pytest.importorskip('tokenizers')
  told = MADE['scores']['told']
  plain = tokenizer_of(tmp_path, 'llama', told, add_space_prefix=False, add_bos_token=False)
  assert plain.token(plain.encode('the')[0])[0] == 't'
  assert plain.encode('the', begin=True) == plain.encode('the')
  assert plain.decode(plain.encode(' the')) == ' the'
  begins = {}
  for pre in ('llama-bpe', 'tekken', 'gpt-2', 'qwen2'):
    tokenizer = tokenizer_of(tmp_path, 'gpt2', MADE['merges']['told'], pre=pre, bos_token_id=0)
    begins[pre] = tokenizer.encode('a', begin=True)[0] == 0
  assert begins == {'llama-bpe': True, 'tekken': True, 'gpt-2': False, 'qwen2': False}


@pytest.mark.parametrize(
  'pre,text,pieces',
  (
    ('starcoder', 'a 12b', ['a', 'Ġ', '1', '2', 'b']),
    ('deepseek-coder', 'ab 12 cd!\n', ['ab', 'Ġ', '1', '2', 'Ġcd', '!', 'Ċ']),
    # Its pattern of punctuation has all of ASCII but digits: words split where other letters end.
    ('deepseek-llm', 'ab 12 Éd!\n 你好', ['ab', 'Ġ', '12', 'ĠÃī', 'd', '!', 'Ċ', 'Ġ', 'ä½łå¥½']),
  ),
)
def test_texts_are_split_where_the_model_was_trained_to(pre, text, pieces, tmp_path):
  pytest.importorskip('tokenizers')
  encoder = tokenizer_of(tmp_path, 'gpt2', MADE['merges']['told'], pre=pre).encoder
  assert [piece for piece, _ in encoder.pre_tokenizer.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize(
  'told,found',
  (
    ('{}', False),
    ('{"eos_token": "</s>"}', False),
    ('{"eos_token": "<e>"}', True),
    ('{"eos_token": {"content": "<e>"}}', True),
  ),
)
def test_a_tokenizer_json_without_an_end_is_refused(told, found, tmp_path):
  tokenizers = pytest.importorskip('tokenizers')
  tokenizers.Tokenizer(tokenizers.models.WordLevel({'<e>': 0, 'a': 1}, '<e>')).save(
    str(tmp_path / 'tokenizer.json')
  )
  (tmp_path / 'tokenizer_config.json').write_text(told)
  if found:
    assert load_tokenizer(tmp_path).eos == 0
    return
  with pytest.raises(ValueError, match='tokenizer_config.json names no end-of-text token'):
    load_tokenizer(tmp_path)


@pytest.mark.assets
def test_smollm2_reads_and_writes_as_in_transformers():
  golden = json.loads((GOLDEN / 'smollm2.json').read_text())
  loaded = models.load('smollm2-135m', scan=True)
  assert sum(x.size for x in jax.tree.leaves(loaded.variables)) == 134_515_008
  tokenizer = load_tokenizer(loaded.tokenizer)
  assert tokenizer.encode(golden['paragraph']) == golden['ids']
  assert tokenizer.encode(golden['text']) == golden['text_ids']
  assert tokenizer.chat(golden['messages']) == golden['chat']

  ids = jnp.array([golden['ids']])
  logits = jax.jit(loaded.model.apply)(loaded.variables, ids)[0, :-1]
  loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[0, 1:, None], -1).mean()
  perplexity = float(jnp.exp(loss))
  assert abs(perplexity / golden['perplexity'] - 1) < 1e-3, perplexity

  written = generate(
    loaded.model,
    loaded.variables,
    [tokenizer.encode(golden['prompt'])],
    new_tokens=len(golden['completion']),
    stop=(tokenizer.eos,),
  )
  assert written.tokens[0].tolist()[: int(written.lengths[0])] == golden['completion']
  assert tokenizer.decode(written.tokens[0]).startswith(' Paris.')
