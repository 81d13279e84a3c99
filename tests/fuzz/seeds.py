"""Valid files to damage, as bytes, made here as small as they can be."""

import functools
import io
import json
import struct
import tarfile
import zlib

import numpy as np
import safetensors.numpy
from PIL import Image

from tests.models.goldens import GOLDEN
from tests.models.io.test_gguf import convert
from tests.models.io.test_packages import onnx_file
from tests.models.io.test_vit_npz import arrays_of

WORDS = ['<unk>', '<s>', '</s>', '<pad>', '[MASK]', *'abcdefgh', 'ab', 'cd', '##b', '\u2581a']
ADDED = [
  {
    'id': i,
    'content': WORDS[i],
    'single_word': False,
    'lstrip': False,
    'rstrip': False,
    'normalized': False,
    'special': True,
  }
  for i in range(5)
]
TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m.content is string %}"
  '{{ m.content | trim }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}'
  '{% endif %}'
  "{% if not loop.last %}{{ ' ' * 2 }}{% endif %}{{ eos_token }}{% endfor %}"
  '{% if add_generation_prompt %}{{ "<|assistant|>" }}{% endif %}{% set n = namespace(i=0) %}'
  '{% for i in range(3) %}{% set n.i = n.i + i %}{% endfor %}{{ n.i }}{{ tools | tojson }}'
)
CONFIG = {'eos_token': '</s>', 'bos_token': {'content': '<s>'}, 'pad_token': '<pad>'}


def as_json(value) -> bytes:
  return json.dumps(value).encode()


def tensors(**arrays) -> bytes:
  return safetensors.numpy.save({name: np.asarray(x, 'f') for name, x in arrays.items()})


def golden(name: str, file: str = 'config.json') -> bytes:
  return (GOLDEN / name / file).read_bytes()


# ---- Tokenizers.


def _tokenizer(model, normalizer=None, pre=None, post=None, decoder=None) -> bytes:
  return as_json(
    {
      'version': '1.0',
      'truncation': None,
      'padding': {
        'strategy': 'BatchLongest',
        'direction': 'Right',
        'pad_to_multiple_of': None,
        'pad_id': 3,
        'pad_type_id': 0,
        'pad_token': '<pad>',
      },
      'added_tokens': ADDED,
      'normalizer': normalizer,
      'pre_tokenizer': pre,
      'post_processor': post,
      'decoder': decoder,
      'model': model,
    }
  )


def tokenizers() -> list[bytes]:
  """A tokenizer.json of each kind of model, with parts of many kinds."""
  ids = {word: i for i, word in enumerate(WORDS)}
  template = {
    'type': 'TemplateProcessing',
    'single': [
      {'SpecialToken': {'id': '<s>', 'type_id': 0}},
      {'Sequence': {'id': 'A', 'type_id': 0}},
    ],
    'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 1}}],
    'special_tokens': {'<s>': {'id': '<s>', 'ids': [1], 'tokens': ['<s>']}},
  }
  byte_level = {
    'type': 'ByteLevel',
    'add_prefix_space': False,
    'trim_offsets': True,
    'use_regex': True,
  }
  split = {
    'type': 'Split',
    'pattern': {'Regex': r'\p{L}+|\s+'},
    'behavior': 'Isolated',
    'invert': False,
  }
  return [
    _tokenizer(
      {
        'type': 'BPE',
        'dropout': None,
        'unk_token': '<unk>',
        'continuing_subword_prefix': None,
        'end_of_word_suffix': None,
        'fuse_unk': False,
        'byte_fallback': False,
        'ignore_merges': False,
        'vocab': ids,
        'merges': [['a', 'b'], ['c', 'd']],
      },
      {'type': 'Sequence', 'normalizers': [{'type': 'NFC'}, {'type': 'Lowercase'}]},
      {'type': 'Sequence', 'pretokenizers': [split, byte_level]},
      template,
      byte_level,
    ),
    _tokenizer(
      {
        'type': 'WordPiece',
        'unk_token': '<unk>',
        'continuing_subword_prefix': '##',
        'max_input_chars_per_word': 100,
        'vocab': ids,
      },
      {
        'type': 'BertNormalizer',
        'clean_text': True,
        'handle_chinese_chars': True,
        'strip_accents': None,
        'lowercase': True,
      },
      {'type': 'BertPreTokenizer'},
      {'type': 'BertProcessing', 'sep': ['</s>', 2], 'cls': ['<s>', 1]},
      {'type': 'WordPiece', 'prefix': '##', 'cleanup': True},
    ),
    _tokenizer(
      {
        'type': 'Unigram',
        'unk_id': 0,
        'vocab': [[word, -float(i)] for i, word in enumerate(WORDS)],
        'byte_fallback': False,
      },
      {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '\u2581'},
      {'type': 'Metaspace', 'replacement': '\u2581', 'prepend_scheme': 'always', 'split': True},
      None,
      {'type': 'Metaspace', 'replacement': '\u2581', 'prepend_scheme': 'always', 'split': True},
    ),
    _tokenizer(
      {'type': 'WordLevel', 'vocab': ids, 'unk_token': '<unk>'}, None, {'type': 'Whitespace'}
    ),
  ]


# ---- Weights.


def npz() -> bytes:
  file = io.BytesIO()
  np.savez(file, **arrays_of())
  return file.getvalue()


def compressed_npz() -> bytes:
  file = io.BytesIO()
  np.savez_compressed(file, **arrays_of())
  return file.getvalue()


def gguf() -> bytes:
  return convert('qwen3', 'qwen3', **gguf_tokenizer('gpt2'))


def gguf_by_scores() -> bytes:
  return convert('llama', 'llama', **gguf_tokenizer('llama'))


def gguf_tokenizer(kind: str) -> dict:
  words = [*WORDS, *(f'<0x{byte:02X}>' for byte in range(256))]
  told = {
    'model': kind,
    'tokens': words,
    'token_type': [3, 3, 3, 3, 3, *[1] * (len(words) - 5)],
    'eos_token_id': 2,
    'bos_token_id': 1,
    'padding_token_id': 3,
    'unknown_token_id': 0,
    'add_bos_token': True,
  }
  if kind == 'gpt2':
    told |= {'pre': 'qwen2', 'merges': ['a b', 'c d']}
  else:
    told |= {'scores': [-float(i) for i in range(len(words))]}
  named = {f'tokenizer.ggml.{name}': value for name, value in told.items()}
  return {**named, 'tokenizer.chat_template': TEMPLATE}


def onnx() -> bytes:
  return onnx_file(np.arange(6, dtype='float32').reshape(2, 3))


# ---- Images.


@functools.cache
def image(kind: str, mode: str = 'RGB', **options) -> bytes:
  pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).convert(mode).save(file, kind, **options)
  return file.getvalue()


def images() -> list[bytes]:
  animated = io.BytesIO()
  frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue')]
  frames[0].save(animated, 'gif', save_all=True, append_images=frames[1:])
  # Small files that claim to be large: each is to be refused by its size.
  bombs = [
    _png(40_000, 40_000),
    _png(11_600, 11_600),
    image('bmp')[:18] + struct.pack('<ii', 30_000, 30_000) + image('bmp')[26:],
    image('gif')[:6] + struct.pack('<HH', 65_535, 65_535) + image('gif')[10:],
    b'P6 60000 60000 255\n' + bytes(999),
  ]
  eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n'
  found = [image(kind) for kind in ('png', 'jpeg', 'webp', 'bmp', 'tiff', 'ppm', 'gif')]
  found += [image('png', mode) for mode in ('RGBA', 'P', '1', 'LA', 'L')]
  found += [image('tiff', 'CMYK'), image('tiff', compression='tiff_lzw')]
  found += [image('tiff', compression='tiff_deflate'), image('jpeg', progressive=True)]
  return [*found, *bombs, animated.getvalue(), eps]


def _png(width: int, height: int) -> bytes:
  """A PNG that says it is so large, of a row of pixels."""

  def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))

  head = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
  body = chunk(b'IDAT', zlib.compress(bytes(3 * width + 1)))
  return b'\x89PNG\r\n\x1a\n' + head + body + chunk(b'IEND', b'')


# ---- Data.


def table(kind: str) -> bytes:
  """A table of texts with labels, as 'parquet', 'arrow' or 'stream'."""
  import pyarrow
  from pyarrow import ipc, parquet

  noted = {'label': {'_type': 'ClassLabel', 'names': ['no', 'yes']}, 'text': {'_type': 'Value'}}
  rows = pyarrow.table({'text': [f't{i}' for i in range(8)], 'label': [i % 2 for i in range(8)]})
  rows = rows.replace_schema_metadata({'huggingface': json.dumps({'info': {'features': noted}})})
  file = io.BytesIO()
  if kind == 'parquet':
    parquet.write_table(rows, file, row_group_size=4)
  else:
    opened = ipc.new_file if kind == 'arrow' else ipc.new_stream
    with opened(file, rows.schema) as writer:
      writer.write_table(rows)
  return file.getvalue()


def tar(form: int = tarfile.PAX_FORMAT) -> bytes:
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode='w', format=form) as opened:
    for i in range(4):
      for suffix, data in (
        ('png', image('png')),
        ('cls', str(i % 2).encode()),
        ('json', as_json({'caption': f'c{i}', 'class': i % 2})),
      ):
        member = tarfile.TarInfo(f'{i}.{suffix}')
        member.size = len(data)
        if i % 2:
          member.name = f'{"deep/" * 40}{member.name}'  # too long for one header
        opened.addfile(member, io.BytesIO(data))
  return file.getvalue()


SQUAD = {
  'version': '1.1',
  'data': [
    {
      'title': 't',
      'paragraphs': [
        {
          'context': f'Jane runs {i}.',
          'qas': [
            {'id': f'q{i}', 'question': 'Who?', 'answers': [{'text': 'Jane', 'answer_start': 0}]},
            {'id': f'n{i}', 'question': 'Why?', 'is_impossible': True, 'answers': []},
          ],
        }
      ],
    }
    for i in range(3)
  ],
}
PREFERENCES = [
  {'prompt': 'a', 'chosen': ' b', 'rejected': ' c'},
  {'chosen': '\n\nHuman: a\n\nAssistant: b', 'rejected': '\n\nHuman: a\n\nAssistant: c'},
  {
    'prompt': [{'role': 'user', 'content': 'a'}],
    'chosen': [{'role': 'assistant', 'content': 'b'}],
    'rejected': [{'role': 'assistant', 'content': 'c'}],
  },
] * 4
RTE = b'index\tsentence1\tsentence2\tlabel\n' + b'0\tIt fell.\tIt rose.\tnot_entailment\n' * 3
CHATS = [
  {
    'messages': [
      {'role': 'user', 'content': f'Hi {i}'},
      {'role': 'assistant', 'content': 'Hello', 'tool_calls': [{'function': {'name': 'f'}}]},
    ],
    'tools': '[{"name": "f"}]',
  }
  for i in range(3)
]
LINES = [{'text': f't{i}', 'label': 'ab'[i % 2], 'image': 'x.png'} for i in range(6)]


def lines(rows) -> bytes:
  return b''.join(as_json(row) + b'\n' for row in rows)
