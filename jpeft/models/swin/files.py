"""Swin as Hugging Face stores it."""

import functools
from collections.abc import Mapping

from ..families import IMAGENET, Family, Request, check_whole, classes_of, with_labels
from ..heads import Heads
from ..io import Checkpoint, Table
from ..nn import (
  activation,
  grid,
  image_example,
  image_size_of,
  patch_size_of,
  resize_grid,
  size_in_config,
)
from .model import Swin

# Names in memory, from transformers 5 on.
_BIAS = 'relative_position_bias_table'
_RENAMED = (
  (f'attention.self.{_BIAS}', f'attention.relative_position_bias.{_BIAS}'),
  ('attention.self.query', 'attention.q_proj'),
  ('attention.self.key', 'attention.k_proj'),
  ('attention.self.value', 'attention.v_proj'),
  ('attention.output.dense', 'attention.o_proj'),
  ('intermediate.dense', 'mlp.fc1'),
  ('output.dense', 'mlp.fc2'),
)
_EMBED = (
  ('embed/patch', 'conv', 'embeddings.patch_embeddings.projection'),
  ('embed/norm', 'norm', 'embeddings.norm'),
  ('embed/position', 'param', 'embeddings.position_embeddings'),
  ('final_norm', 'norm', 'layernorm'),
)
# Of a stage.
_STAGE = (
  ('block/norm1', 'norm', 'blocks.{i}.layernorm_before'),
  ('block/norm2', 'norm', 'blocks.{i}.layernorm_after'),
  ('block/attention/query', 'dense', 'blocks.{i}.attention.self.query'),
  ('block/attention/key', 'dense', 'blocks.{i}.attention.self.key'),
  ('block/attention/value', 'dense', 'blocks.{i}.attention.self.value'),
  ('block/attention/out', 'dense', 'blocks.{i}.attention.output.dense'),
  ('block/position_bias/embedding', 'param', f'blocks.{{i}}.attention.self.{_BIAS}'),
  ('block/mlp/fc1', 'dense', 'blocks.{i}.intermediate.dense'),
  ('block/mlp/fc2', 'dense', 'blocks.{i}.output.dense'),
  ('merge/norm', 'norm', 'downsample.norm'),
  ('merge/reduction', 'dense', 'downsample.reduction'),
)


def _table(model: Swin) -> Table:
  stages = []
  for i in range(len(model.depths)):
    for path, kind, key in _STAGE:
      stages.append((f'encoder/stage_{i}/{path}', kind, f'encoder.layers.{i}.{key}'))
  return Table(
    base='swin.',
    rows=(*_EMBED, *stages),
    head=(('head', 'dense', 'classifier'),),
    # Older files have numbers that follow from the sizes; others a head that paints pixels.
    ignore=(
      r'.*\.(relative_position_index|attn_mask)',
      r'embeddings\.mask_token',
      r'classifier\..*',
      r'decoder\..*',
    ),
    architectures=('SwinModel', 'SwinForImageClassification'),
    fresh=(),
    renamed=_RENAMED,
  )


def _build(config: Mapping, checkpoint: Checkpoint | None, request: Request) -> Swin:
  check_whole(request)
  width, heads = config.get('embed_dim', 96), tuple(config['num_heads'])
  for i, count in enumerate(heads):
    if width * 2**i % count:
      raise ValueError(f'a width of {width * 2**i} in stage {i} cannot be shared by {count} heads')
  return Swin(
    width,
    tuple(config['depths']),
    heads,
    config.get('window_size', 7),
    patch_size=patch_size_of({'patch_size': 4, **config}),
    image_size=request.image_size or image_size_of(config),
    mlp_ratio=config.get('mlp_ratio', 4.0),
    num_classes=classes_of(checkpoint, request),
    pool=request.pool or config.get('jpeft_pool', 'mean'),
    position=config.get('use_absolute_embeddings', False),
    qkv_bias=config.get('qkv_bias', True),
    eps=config.get('layer_norm_eps', 1e-5),
    activation=activation(config.get('hidden_act', 'gelu')),
    dropout=config.get('hidden_dropout_prob', 0.0),
    attention_dropout=config.get('attention_probs_dropout_prob', 0.0),
    **request.fields,
  )


def _describe(config: Mapping, model: Swin) -> dict:
  config = with_labels(config, model.num_classes)
  return config | {'jpeft_pool': model.pool, 'image_size': size_in_config(model)}


def _edits(config: Mapping, model: Swin) -> dict:
  old = grid(image_size_of(config), model.patch_size)
  new = grid(model.image_size, model.patch_size)
  if old == new:
    return {}
  return {'embed/position': functools.partial(resize_grid, old=old, new=new)}


SWIN_FAMILIES = {
  'swin': Family(
    _build,
    _table,
    image_example,
    _describe,
    _edits,
    colours=IMAGENET,
    heads=Heads({'classification': r'classifier\.weight'}, others=(r'decoder\..*',)),
  )
}
