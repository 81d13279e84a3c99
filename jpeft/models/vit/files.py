"""ViT, DeiT and DINOv2 as Hugging Face stores them."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ..families import HALF, IMAGENET, Family, Request, depth_of, shape_of, with_labels
from ..io.layout import Table
from ..io.safetensors import Checkpoint
from ..nn.layers import activation
from ..nn.positions import resize_grid
from .model import ViT, grid

_EMBED = (
  ('embed/cls', 'param', 'embeddings.cls_token'),
  ('embed/distill', 'param', 'embeddings.distillation_token'),
  ('embed/mask', 'param', 'embeddings.mask_token'),
  ('embed/position', 'param', 'embeddings.position_embeddings'),
  ('embed/patch', 'conv', 'embeddings.patch_embeddings.projection'),
  ('final_norm', 'norm', 'layernorm'),
)
_ATTENTION = (
  ('encoder/block/attention/query', 'dense', 'encoder.layer.{i}.attention.attention.query'),
  ('encoder/block/attention/key', 'dense', 'encoder.layer.{i}.attention.attention.key'),
  ('encoder/block/attention/value', 'dense', 'encoder.layer.{i}.attention.attention.value'),
  ('encoder/block/attention/out', 'dense', 'encoder.layer.{i}.attention.output.dense'),
)
# Heads that the model was not asked to have, and masked image modelling.
_IGNORE = (r'pooler\..*', r'(\w+_)?classifier\..*', r'embeddings\.mask_token', r'decoder\..*')

VIT = Table(
  'vit.',
  _EMBED
  + _ATTENTION
  + (
    ('encoder/block/norm1', 'norm', 'encoder.layer.{i}.layernorm_before'),
    ('encoder/block/norm2', 'norm', 'encoder.layer.{i}.layernorm_after'),
    ('encoder/block/mlp/fc1', 'dense', 'encoder.layer.{i}.intermediate.dense'),
    ('encoder/block/mlp/fc2', 'dense', 'encoder.layer.{i}.output.dense'),
    ('pooler', 'dense', 'pooler.dense'),
  ),
  (('head', 'dense', 'classifier'),),
  _IGNORE,
  ('ViTModel', 'ViTForImageClassification'),
)

DEIT = VIT._replace(base='deit.', architectures=('DeiTModel', 'DeiTForImageClassification'))
DEIT_TEACHER = DEIT._replace(
  head=(('head', 'dense', 'cls_classifier'), ('head_distill', 'dense', 'distillation_classifier')),
  architectures=('DeiTModel', 'DeiTForImageClassificationWithTeacher'),
)

DINOV2 = Table(
  'dinov2.',
  _EMBED
  + _ATTENTION
  + (
    ('encoder/block/norm1', 'norm', 'encoder.layer.{i}.norm1'),
    ('encoder/block/norm2', 'norm', 'encoder.layer.{i}.norm2'),
    ('encoder/block/mlp/fc1', 'dense', 'encoder.layer.{i}.mlp.fc1'),
    ('encoder/block/mlp/fc2', 'dense', 'encoder.layer.{i}.mlp.fc2'),
    ('encoder/block/scale1/scale', 'param', 'encoder.layer.{i}.layer_scale1.lambda1'),
    ('encoder/block/scale2/scale', 'param', 'encoder.layer.{i}.layer_scale2.lambda1'),
  ),
  (('head', 'dense', 'classifier'),),
  _IGNORE,
  ('Dinov2Model', 'Dinov2ForImageClassification'),
)


def _size(size) -> int | tuple[int, int]:
  return size if isinstance(size, int) else tuple(size)


def _build(config: Mapping, checkpoint: Checkpoint | None, request: Request) -> ViT:
  kind, width = config['model_type'], config['hidden_size']
  if config.get('use_swiglu_ffn'):
    raise ValueError(
      'DINOv2 with use_swiglu_ffn (the giant variant) is not supported; its small, '
      'base and large variants are'
    )
  names = ('cls_classifier', 'classifier') if kind == 'deit' else ('classifier',)
  heads = [shape for name in names if (shape := shape_of(checkpoint, f'{name}.weight'))]
  classes = request.num_classes
  if classes is None and heads and request.pool != 'tokens':
    classes = heads[0][0]
  pool = request.pool or config.get('jpeft_pool', 'cls_mean' if kind == 'dinov2' else 'cls')
  bare = classes is None and pool == 'cls' and kind != 'dinov2'
  return ViT(
    width,
    depth_of(config, 'num_hidden_layers', request),
    config['num_attention_heads'],
    mlp_dim=config.get('intermediate_size') or int(width * config.get('mlp_ratio', 4)),
    patch_size=config['patch_size'],
    image_size=request.image_size or _size(config['image_size']),
    num_classes=classes,
    pool=pool,
    pooler=bare and shape_of(checkpoint, 'pooler.dense.weight') is not None,
    distill=kind == 'deit',
    distill_head=classes is not None
    and bool(shape_of(checkpoint, 'distillation_classifier.weight')),
    mask_token=kind == 'dinov2' and config.get('use_mask_token', True),
    layer_scale=config.get('layerscale_value', 1.0) if kind == 'dinov2' else None,
    qkv_bias=config.get('qkv_bias', True),
    eps=config.get('layer_norm_eps', 1e-12),
    activation=activation(config.get('hidden_act', 'gelu')),
    dropout=config.get('hidden_dropout_prob', 0.0),
    attention_dropout=config.get('attention_probs_dropout_prob', 0.0),
    **request.fields,
  )


def _describe(config: Mapping, model: ViT) -> dict:
  config, size = with_labels(config, model.num_classes), model.image_size
  if model.depth != config['num_hidden_layers']:  # these name layers that may be gone
    config = {
      k: v for k, v in config.items() if k not in ('stage_names', 'out_features', 'out_indices')
    }
  return config | {
    'num_hidden_layers': model.depth,
    'jpeft_pool': model.pool,
    'image_size': size if isinstance(size, int) else list(size),
  }


def _edits(config: Mapping, model: ViT) -> dict:
  old = grid(_size(config['image_size']), config['patch_size'])
  new = grid(model.image_size, model.patch_size)
  return {} if old == new else {'embed/position': functools.partial(resize_grid, old=old, new=new)}


def _example(model: ViT) -> tuple:
  rows, columns = grid(model.image_size, model.patch_size)
  size = rows * model.patch_size, columns * model.patch_size
  return (jax.ShapeDtypeStruct((1, *size, 3), jnp.float32),)


_family = functools.partial(Family, _build, example=_example, describe=_describe, edits=_edits)
VIT_FAMILIES = {
  'vit': _family(table=lambda model: VIT, colours=HALF),
  'deit': _family(
    table=lambda model: DEIT_TEACHER if model.distill_head else DEIT, colours=IMAGENET
  ),
  'dinov2': _family(table=lambda model: DINOV2, colours=IMAGENET),
}
