"""The towers of images of CLIP (arXiv:2103.00020) and SigLIP (arXiv:2303.15343), as Hugging Face
stores them: alone, or beside a tower of text, which is not read.

A fresh head reads what the tower itself returns: the normalised class token of CLIP, the attention
pooling of SigLIP. The classes of transformers with labels read a mean of the patches, which is
pool='mean' here.
"""

import functools
from collections.abc import Mapping
from typing import Any

from ..families import HALF, Family, Request, classes_of, depth_of, with_labels
from ..heads import Heads
from ..io import Checkpoint, Table
from ..nn import activation, image_example, image_size_of, patch_size_of, size_in_config
from .files import position_edits
from .model import ViT

_CLIP_COLOURS = {
  'mean': (0.48145466, 0.4578275, 0.40821073),
  'std': (0.26862954, 0.26130258, 0.27577711),
}
_BLOCK = (
  ('encoder/block/norm1', 'norm', 'encoder.layers.{i}.layer_norm1'),
  ('encoder/block/norm2', 'norm', 'encoder.layers.{i}.layer_norm2'),
  ('encoder/block/attention/query', 'dense', 'encoder.layers.{i}.self_attn.q_proj'),
  ('encoder/block/attention/key', 'dense', 'encoder.layers.{i}.self_attn.k_proj'),
  ('encoder/block/attention/value', 'dense', 'encoder.layers.{i}.self_attn.v_proj'),
  ('encoder/block/attention/out', 'dense', 'encoder.layers.{i}.self_attn.out_proj'),
  ('encoder/block/mlp/fc1', 'dense', 'encoder.layers.{i}.mlp.fc1'),
  ('encoder/block/mlp/fc2', 'dense', 'encoder.layers.{i}.mlp.fc2'),
)
# What stands beside the tower, and a head that the model does without, which is decided before.
_BESIDE = (
  r'text_model\..*',
  r'(text|visual)_projection\..*',
  r'logit_(scale|bias)',
  r'embeddings\.position_ids',
  r'classifier\..*',
)

CLIP = Table(
  base='vision_model.',
  prefixed=True,
  rows=(
    ('embed/cls', 'vector', 'embeddings.class_embedding'),
    ('embed/position', 'positions', 'embeddings.position_embedding'),
    ('embed/patch', 'conv', 'embeddings.patch_embedding'),
    ('first_norm', 'norm', 'pre_layrnorm'),  # spelt so
    *_BLOCK,
    ('pool_norm', 'norm', 'post_layernorm'),
  ),
  head=(('head', 'dense', 'classifier'),),
  ignore=(*_BESIDE, r'post_layernorm\..*'),
  architectures=('CLIPVisionModel', 'CLIPForImageClassification'),
  fresh=(),
)
SIGLIP = Table(
  base='vision_model.',
  prefixed=True,
  rows=(
    ('patches/position', 'positions', 'embeddings.position_embedding'),
    ('patches/patch', 'conv', 'embeddings.patch_embedding'),
    *_BLOCK,
    ('final_norm', 'norm', 'post_layernorm'),
    ('attention_pool/query', 'param', 'head.probe'),
    ('attention_pool/attention/qkv', 'in_proj', 'head.attention.in_proj'),
    ('attention_pool/attention/out', 'dense', 'head.attention.out_proj'),
    ('attention_pool/norm', 'norm', 'head.layernorm'),
    ('attention_pool/mlp/fc1', 'dense', 'head.mlp.fc1'),
    ('attention_pool/mlp/fc2', 'dense', 'head.mlp.fc2'),
  ),
  head=(('head', 'dense', 'classifier'),),
  ignore=(*_BESIDE, r'head\..*'),
  architectures=('SiglipVisionModel', 'SiglipForImageClassification'),
  fresh=(),
)
_HEADS = Heads({'classification': r'classifier\.weight'})
# Configs leave out what transformers has by default.
_SIZES = {
  'hidden_size': 768,
  'intermediate_size': 3072,
  'num_hidden_layers': 12,
  'num_attention_heads': 12,
  'image_size': 224,
}
_CLIP = {**_SIZES, 'patch_size': 32, 'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5}
_SIGLIP = {**_SIZES, 'patch_size': 16, 'hidden_act': 'gelu_pytorch_tanh', 'layer_norm_eps': 1e-6}


def _tower(config: dict[str, Any], defaults: Mapping) -> dict[str, Any]:
  """The config of the tower of images, of its own or of one of both towers.

  Raises:
    KeyError: a config of both towers has none.
  """
  if config['model_type'] in ('clip', 'siglip'):
    config = config['vision_config']
  return {**defaults} | config


def _fields(config: Mapping, checkpoint: Checkpoint | None, request: Request) -> dict[str, Any]:
  """The fields that both have in common, of the config of a tower."""
  return {
    'width': config['hidden_size'],
    'depth': depth_of(config, 'num_hidden_layers', request),
    'heads': config['num_attention_heads'],
    'mlp_dim': config['intermediate_size'],
    'patch_size': patch_size_of(config),
    'image_size': request.image_size or image_size_of(config),
    'num_classes': classes_of(checkpoint, request),
    'eps': config['layer_norm_eps'],
    'activation': activation(config['hidden_act']),
    'attention_dropout': config.get('attention_dropout') or 0.0,
    **request.fields,
  }


def _pool(own: str, config: Mapping, request: Request, classes: int | None) -> str:
  """What the head reads: that of the request, of the config, of transformers for its own head."""
  is_stored = classes is not None and request.num_classes is None
  return request.pool or config.get('jpeft_pool') or ('mean' if is_stored else own)


def _build_clip(config: Mapping, checkpoint: Checkpoint | None, request: Request) -> ViT:
  fields = _fields(_tower(config, _CLIP), checkpoint, request)
  pool = _pool('cls', config, request, fields['num_classes'])
  return ViT(
    **fields,
    pool=pool,
    patch_bias=False,
    first_norm=True,
    last_norm=pool != 'mean',
    norm_pooled=True,
  )


def _build_siglip(config: Mapping, checkpoint: Checkpoint | None, request: Request) -> ViT:
  tower = _tower(config, _SIGLIP)
  fields = _fields(tower, checkpoint, request)
  has_layer = tower.get('vision_use_head', True)
  own = 'attention' if has_layer else 'mean'
  return ViT(
    **fields,
    pool=_pool(own, config, request, fields['num_classes']),
    pool_mlp_dim=tower['intermediate_size'] if has_layer else None,
    cls=False,
  )


def _describe(config: Mapping, model: ViT) -> dict:
  """The config of a file; with a head that of both towers, which transformers asks for there."""
  kind = config['model_type'].removesuffix('_vision_model')
  if model.num_classes is not None and config['model_type'] != kind:
    inside = {key: value for key, value in config.items() if not key.startswith('jpeft_')}
    config = {**config, 'model_type': kind, 'vision_config': inside}
    for key in inside:
      if key not in ('model_type', 'id2label', 'label2id'):
        del config[key]
  config = with_labels(config, model.num_classes)
  sizes = {'num_hidden_layers': model.depth, 'image_size': size_in_config(model)}
  config['jpeft_pool'] = model.pool
  if config['model_type'] == kind:
    config['vision_config'] = {**config['vision_config'], **sizes}
    return config
  return config | sizes


def _edits(config: Mapping, model: ViT, defaults: Mapping) -> dict:
  return position_edits(_tower(config, defaults), model)


def _family(build, table: Table, defaults: Mapping, colours: Mapping) -> Family:
  return Family(
    build,
    lambda model: table,
    image_example,
    _describe,
    functools.partial(_edits, defaults=defaults),
    colours=colours,
    heads=_HEADS,
    their_pool='mean',
  )


_clip = _family(_build_clip, CLIP, _CLIP, _CLIP_COLOURS)
_siglip = _family(_build_siglip, SIGLIP, _SIGLIP, HALF)
TOWER_FAMILIES = {
  'clip': _clip,
  'clip_vision_model': _clip,
  'siglip': _siglip,
  'siglip_vision_model': _siglip,
}
