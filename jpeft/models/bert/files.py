"""BERT and its kin as Hugging Face stores them."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..families import Family, Request, depth_of, shape_of, with_labels
from ..heads import Heads
from ..io import Checkpoint, Table, read_json
from ..nn import activation, gelu
from .model import Bert

Rows = tuple[tuple[str, str, str], ...]


def _rows(layer: str, names: Mapping[str, str], norms: Mapping[str, str]) -> Rows:
  """The rows of the blocks, of the names of their modules behind that of the layer."""
  rows = []
  for kind, modules in (('dense', names), ('norm', norms)):
    for ours, theirs in modules.items():
      rows.append((f'encoder/block/{ours}', kind, f'{layer}.{{i}}.{theirs}'))
  return tuple(rows)


_EMBED = (
  ('embed/word', 'embed', 'embeddings.word_embeddings'),
  ('embed/position', 'embed', 'embeddings.position_embeddings'),
  ('embed/type', 'embed', 'embeddings.token_type_embeddings'),
  ('embed/norm', 'norm', 'embeddings.LayerNorm'),
)
_MLP = {'mlp/fc1': 'intermediate.dense', 'mlp/fc2': 'output.dense'}
_BERT_ROWS = _EMBED + _rows(
  'encoder.layer',
  {
    'attention/query': 'attention.self.query',
    'attention/key': 'attention.self.key',
    'attention/value': 'attention.self.value',
    'attention/out': 'attention.output.dense',
    **_MLP,
  },
  {'norm1': 'attention.output.LayerNorm', 'norm2': 'output.LayerNorm'},
)
_ELECTRA_ROWS = (*_BERT_ROWS, ('embed/project', 'dense', 'embeddings_project'))
_MPNET_ROWS = (
  *_EMBED,
  ('position_bias', 'embed', 'encoder.relative_attention_bias'),
  *_rows(
    'encoder.layer',
    {
      'attention/query': 'attention.attn.q',
      'attention/key': 'attention.attn.k',
      'attention/value': 'attention.attn.v',
      'attention/out': 'attention.attn.o',
      **_MLP,
    },
    {'norm1': 'attention.LayerNorm', 'norm2': 'output.LayerNorm'},
  ),
)
_DISTILBERT_ROWS = _EMBED + _rows(
  'transformer.layer',
  {
    'attention/query': 'attention.q_lin',
    'attention/key': 'attention.k_lin',
    'attention/value': 'attention.v_lin',
    'attention/out': 'attention.out_lin',
    'mlp/fc1': 'ffn.lin1',
    'mlp/fc2': 'ffn.lin2',
  },
  {'norm1': 'sa_layer_norm', 'norm2': 'output_layer_norm'},
)


class Kin(NamedTuple):
  """What a family calls its parts on disk, and how it differs from BERT.

  Attributes:
    name: of its classes in transformers.
    base: prefix of the keys of the base model.
    rows: of the base model.
    pooler: of the bare model; None without one.
    pooler_activation: after the pooler, and after the Dense of the classifier.
    classifier: keys of the classifier's Dense, if that is no pooler, and of its last layer.
    masked: keys of the Dense, the norm, the table and the bias of the head of masked words. The
      table is the word table, so that files rarely have it.
    counts_pads: whether positions are counted as in RoBERTa.
    types: rows of the type table where the config does not say it.
    others: patterns of heads that jpeft does not have.
  """

  name: str
  base: str
  rows: Rows
  pooler: str | None
  pooler_activation: Callable[[jax.Array], jax.Array]
  classifier: tuple[str | None, str]
  masked: tuple[str, str, str, str]
  counts_pads: bool = False
  types: int = 2
  others: tuple[str, ...] = ()


_LM_HEAD = ('lm_head.dense', 'lm_head.layer_norm', 'lm_head.decoder.weight', 'lm_head.bias')
# The classifier is a pooler and a head under other names.
_TWO_LAYERS = ('classifier.dense', 'classifier.out_proj')
_CLS = 'cls.predictions'
_ROBERTA = Kin(
  'Roberta',
  'roberta.',
  _BERT_ROWS,
  'pooler.dense',
  jnp.tanh,
  _TWO_LAYERS,
  _LM_HEAD,
  counts_pads=True,
)
KIN = {
  'bert': Kin(
    'Bert',
    'bert.',
    _BERT_ROWS,
    'pooler.dense',
    jnp.tanh,
    (None, 'classifier'),
    (
      f'{_CLS}.transform.dense',
      f'{_CLS}.transform.LayerNorm',
      f'{_CLS}.decoder.weight',
      f'{_CLS}.bias',
    ),
    others=(r'cls\.seq_relationship\.weight',),
  ),
  'roberta': _ROBERTA,
  'xlm-roberta': _ROBERTA._replace(name='XLMRoberta'),
  'camembert': _ROBERTA._replace(name='Camembert'),
  'distilbert': Kin(
    'DistilBert',
    'distilbert.',
    _DISTILBERT_ROWS,
    None,
    nn.relu,
    ('pre_classifier', 'classifier'),
    ('vocab_transform', 'vocab_layer_norm', 'vocab_projector.weight', 'vocab_projector.bias'),
    types=0,
  ),
  'electra': Kin(
    'Electra',
    'electra.',
    _ELECTRA_ROWS,
    None,
    gelu,
    _TWO_LAYERS,
    (
      'generator_predictions.dense',
      'generator_predictions.LayerNorm',
      'generator_lm_head.weight',
      'generator_lm_head.bias',
    ),
    others=(r'discriminator_predictions\..*',),
  ),
  'mpnet': _ROBERTA._replace(name='MPNet', base='mpnet.', rows=_MPNET_ROWS, types=0),
}
# Keys of transformers' configs of DistilBERT, by those of BERT.
_DISTILBERT_KEYS = {
  'hidden_size': 'dim',
  'num_hidden_layers': 'n_layers',
  'num_attention_heads': 'n_heads',
  'intermediate_size': 'hidden_dim',
  'hidden_act': 'activation',
  'hidden_dropout_prob': 'dropout',
  'attention_probs_dropout_prob': 'attention_dropout',
}
_QUESTIONS = 'qa_outputs'


def _key(kind: str, name: str) -> str:
  """The key of a config of this family, by that of BERT's."""
  if kind == 'distilbert':
    return _DISTILBERT_KEYS.get(name, name)
  return name


def _heads(kin: Kin) -> Heads:
  keys = {
    'classification': kin.classifier[1],
    # Of BERT the same key as that of the classifier, which the class in the config tells apart.
    'tokens': 'classifier',
    'questions': _QUESTIONS,
    'masked': kin.masked[0],
  }
  if kin.classifier[0] is not None:
    keys['classification'] = kin.classifier[0]
  return Heads({head: rf'{key}\.weight' for head, key in keys.items()}, kin.others)


def _table(kind: str, model: Bert) -> Table:
  kin = KIN[kind]
  rows = kin.rows
  head: Rows = ()
  purpose = 'ForSequenceClassification'
  name = model.head
  if name is None and model.num_classes is not None:
    name = 'classification'
  if name in (None, 'classification') and kin.pooler is not None:
    if name is None or kin.classifier[0] is None:
      rows = (*rows, ('pooler', 'dense', kin.pooler))
  if name == 'classification':
    first, last = kin.classifier
    head = (('head', 'dense', last),)
    if first is not None:
      head = (('pooler', 'dense', first), *head)
  elif name == 'tokens':
    purpose = 'ForTokenClassification'
    head = (('head', 'dense', 'classifier'),)
  elif name == 'questions':
    purpose = 'ForQuestionAnswering'
    head = (('head', 'dense', _QUESTIONS),)
  elif name == 'masked':
    purpose = 'ForMaskedLM'
    dense, norm, _, bias = kin.masked
    head = (
      ('head_dense', 'dense', dense),
      ('head_norm', 'norm', norm),
      ('head/bias', 'param', bias),
    )
  architectures = (f'{kin.name}Model', f'{kin.name}{purpose}')
  return Table(kin.base, rows, head, _ignored(kin), architectures)


def _ignored(kin: Kin) -> tuple[str, ...]:
  """Buffers, and parts of heads that the model does without, which is decided before."""
  modules = {'pooler', 'classifier', 'pre_classifier', _QUESTIONS}
  modules |= {key.partition('.')[0] for key in kin.masked}
  return (
    r'embeddings\.(position|token_type)_ids',
    *(rf'{module}\..*' for module in sorted(modules)),
    *kin.others,
  )


def _pool(config: Mapping, checkpoint: Checkpoint | None) -> str:
  """The pooling in the config, else that of the sentence encoder, else 'cls'."""
  if 'jpeft_pool' in config:
    return config['jpeft_pool']
  if checkpoint is None:
    return 'cls'
  file = checkpoint.folder / '1_Pooling' / 'config.json'  # of sentence encoders
  if file.exists() and read_json(file).get('pooling_mode_mean_tokens'):
    return 'mean'
  return 'cls'


def _build(kind: str, config: Mapping, checkpoint: Checkpoint | None, request: Request) -> Bert:
  kin = KIN[kind]
  if config.get('position_embedding_type', 'absolute') != 'absolute':
    raise ValueError(
      f'position_embedding_type {config["position_embedding_type"]!r} is not '
      "supported, only 'absolute'"
    )

  if config.get('is_decoder'):
    raise ValueError(
      'is_decoder=True makes of this encoder a decoder, whose tokens see those before them alone: '
      'that is not supported'
    )

  def get(name, default=None):
    return config.get(_key(kind, name), default)

  pool = request.pool or _pool(config, checkpoint)
  if request.head in ('tokens', 'questions', 'masked') and request.pool is not None:
    raise ValueError(
      f'head {request.head!r} reads every token: it takes no pool, got {request.pool!r}'
    )
  if request.head == 'masked':
    _check_tied(kin, config, checkpoint)
  pad_id = get('pad_token_id', 1) if kin.counts_pads else None
  hidden = config[_key(kind, 'hidden_size')]
  bias_buckets = None
  if kind == 'mpnet':
    bias_buckets = get('relative_attention_num_buckets', 32)
  head_activation = gelu
  if kind in ('bert', 'distilbert'):
    head_activation = activation(get('hidden_act', 'gelu'))
  return Bert(
    hidden,
    depth_of(config, _key(kind, 'num_hidden_layers'), request),
    config[_key(kind, 'num_attention_heads')],
    config[_key(kind, 'intermediate_size')],
    config['vocab_size'],
    config['max_position_embeddings'],
    get('type_vocab_size', 2) if kin.types else 0,
    pad_id=pad_id,
    table_width=get('embedding_size', 128) if kind == 'electra' else None,
    bias_buckets=bias_buckets,
    num_classes=_classes(kin, checkpoint, request),
    head=request.head,
    pool=pool,
    pooler=pool == 'cls' and _has_pooler(kin, checkpoint, request.head),
    pooler_activation=kin.pooler_activation,
    head_activation=head_activation,
    eps=get('layer_norm_eps', 1e-12),
    activation=activation(get('hidden_act', 'gelu')),
    dropout=get('hidden_dropout_prob', 0.1),
    attention_dropout=get('attention_probs_dropout_prob', 0.1),
    **request.fields,
  )


def _classes(kin: Kin, checkpoint: Checkpoint | None, request: Request) -> int | None:
  """The number of labels: that of the request, else that of the head in the files."""
  if request.head not in ('classification', 'tokens'):
    return None
  if request.num_classes is not None:
    return request.num_classes
  key = kin.classifier[1] if request.head == 'classification' else 'classifier'
  shape = shape_of(checkpoint, f'{key}.weight')
  return shape[0] if shape else None


def _has_pooler(kin: Kin, checkpoint: Checkpoint | None, head: str | None) -> bool:
  """Whether a Dense follows the first token."""
  if head in ('tokens', 'questions', 'masked'):
    return False
  if head == 'classification' and kin.classifier[0] is not None:
    return True
  return kin.pooler is not None and shape_of(checkpoint, f'{kin.pooler}.weight') is not None


def _check_tied(kin: Kin, config: Mapping, checkpoint: Checkpoint | None) -> None:
  """Raises a ValueError where the head of masked words has a table of its own."""
  own = not config.get('tie_word_embeddings', True)
  decoder = kin.masked[2]
  words = f'{kin.base}embeddings.word_embeddings.weight'
  if checkpoint is not None and {decoder, words} <= set(checkpoint.shapes):
    own = not np.array_equal(checkpoint.read(decoder), checkpoint.read(words))
  if own:
    raise ValueError(
      f"head 'masked' reads the word table, and this one has a table of its own, {decoder!r}: "
      'head=None loads the model without it'
    )


def _describe(kind: str, config: Mapping, model: Bert) -> dict:
  classes = 2 if model.head == 'questions' else model.num_classes
  return with_labels(config, classes) | {
    _key(kind, 'num_hidden_layers'): model.depth,
    'jpeft_pool': model.pool,  # our own key, which transformers ignores
  }


def example(model: Bert) -> tuple:
  """Abstract inputs of one call."""
  return (jax.ShapeDtypeStruct((1, 8), jnp.int32),)


def _family(kind: str) -> Family:
  sizes = {'heads': 'num_attention_heads', 'mlp_dim': 'intermediate_size'}
  return Family(
    functools.partial(_build, kind),
    functools.partial(_table, kind),
    example,
    functools.partial(_describe, kind),
    sizes={ours: _key(kind, theirs) for ours, theirs in sizes.items()},
    heads=_heads(KIN[kind]),
  )


BERT_FAMILIES = {kind: _family(kind) for kind in KIN}
