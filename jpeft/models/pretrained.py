"""load and save_pretrained: real checkpoints in and out, in the layout of Hugging Face."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from jpeft.core import sites_of
from jpeft.messages import nearest
from jpeft.quant import Format, coded, kernels
from jpeft.quant import quantize as quantized

from .bert.files import BERT_FAMILIES
from .families import Family, Request
from .io import safetensors as files
from .io.convert import from_files, to_tensors
from .io.gguf import GGUF_FILE as GGUF
from .io.gguf import Gguf
from .io.safetensors import Checkpoint
from .io.sources import find
from .io.tokenizer import Tokenizer, load_tokenizer
from .llama.files import LLAMA_FAMILIES
from .llama.model import Llama
from .nn.blocks import Remat
from .t5.files import T5_FAMILIES
from .vit.files import VIT_FAMILIES

FAMILIES: dict[str, Family] = {**VIT_FAMILIES, **BERT_FAMILIES, **T5_FAMILIES, **LLAMA_FAMILIES}


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A backbone with its weights.

  Attributes:
    model: the Linen module.
    variables: {'params': ...}.
    config: the Hugging Face config, brought up to date with what was asked for.
    family: its model_type: vit, deit, dinov2, bert, roberta, t5, llama, mistral, qwen2 or qwen3.
    preprocess: mean and std of pixels in [0, 1], and image_size; None for text.
    tokenizer: path of tokenizer.json, or of the GGUF file, see `load_tokenizer`; None if there is
      none.
    files: {file: sha256} of what the weights were read from.
  """

  model: nn.Module
  variables: dict[str, Any]
  config: dict[str, Any]
  family: str
  preprocess: dict[str, Any] | None
  tokenizer: str | None
  files: dict[str, str]


def load(
  source: str | Path,
  *,
  num_classes: int | None = None,
  image_size: int | None = None,
  dtype: Any = 'float32',
  param_dtype: Any = 'float32',
  scan: bool = False,
  remat: Remat = False,
  seed: int = 0,
  layers: int | None = None,
  pool: str | None = None,
  dropout: float | None = None,
  quantize: Format | None = None,
  targets: str = '{linear}',
) -> Pretrained:
  """Loads a backbone.

  Args:
    source: a folder with config.json and safetensors files (or model.gguf); a .gguf file; the name
      of weights that a Python package carries ('dinov2-s14', 'minilm-l6', 'smollm2-135m'); or the
      id of a model on the Hugging Face hub ('org/name', needs huggingface_hub).
    num_classes: None keeps the head of the checkpoint, if it has one; a number makes a fresh one.
    image_size: side of the images in pixels; position tables are resized to it. None as trained.
    dtype: of the computation.
    param_dtype: of the weights.
    scan: stack the blocks and run them by nn.scan.
    remat: recompute each block in the backward pass; with 'dots' all of it but its products with
      weights.
    seed: of what is fresh.
    layers: keep the first so many blocks (T5: of each stack).
    pool: what the head reads, or what comes out without one: 'cls', 'mean', 'cls_mean' (images
      only) or 'tokens'. None as the family does: 'cls_mean' for DINOv2, 'mean' for sentence
      encoders such as MiniLM, else 'cls'.
    dropout: every dropout rate of the model; None as the checkpoint's config says.
    quantize: store kernels in 4 bits, such as `jpeft.nf4()`; they are read and coded one at a time.
    targets: pattern of the modules whose kernels are.

  Returns:
    A `Pretrained`. Its model returns logits if it has a head, else the pooled feature.

  Raises:
    ValueError: the source is unknown, or its tensors do not fit the model.
    FileNotFoundError: a file is missing.

  Example:
    >>> loaded = jpeft.load('dinov2-s14', num_classes=10, image_size=56)  # doctest: +SKIP
    >>> logits = loaded.model.apply(loaded.variables, images)  # doctest: +SKIP
  """
  folder, origin = find(source)
  checkpoint, config = _opened(folder)
  family = family_of(config)
  model = _build(
    config,
    checkpoint,
    num_classes=num_classes,
    image_size=image_size,
    dtype=dtype,
    param_dtype=param_dtype,
    scan=scan,
    remat=remat,
    layers=layers,
    pool=pool,
    dropout=dropout,
  )
  table = family.table(model)
  shapes = shapes_of(model, family)
  fresh = _fresh(shapes, checkpoint, num_classes)
  params = from_files(
    checkpoint,
    table,
    shapes,
    fresh=fresh,
    layers=layers,
    param_dtype=model.param_dtype,
    edits=family.edits(config, model) if image_size is not None else {},
    coded={} if quantize is None else _coded(model, family, quantize, targets),
  )
  params |= _new(fresh, shapes, seed, model.param_dtype)
  return Pretrained(
    model,
    {'params': traverse_util.unflatten_dict(params, sep='/')},
    family.describe(config, model),
    config['model_type'],
    _preprocess(folder, family, model),
    _file(folder if folder.is_file() else folder / 'tokenizer.json'),
    {**origin, **checkpoint.files},
  )


def _coded(model, family: Family, form: Format, targets: str) -> dict[str, Any]:
  """{path: its layers -> a box} of the kernels that are quantized."""
  held = jax.eval_shape(model.init, jax.random.key(0), *family.example(model))
  found = kernels(sites_of(model, held, *family.example(model)), targets)
  return {path: functools.partial(coded, form, *place) for path, place in found.items()}


def describe(source: str | Path, **options) -> Pretrained:
  """What `load` gives with the same arguments, as shapes: no weights are read, nor fetched from the
  hub.

  A folder with config.json alone will do; what only tensors tell (a pooler, a head) is then left
  out.
  """
  folder, _ = find(source, weights=False)
  checkpoint, config = _opened(folder, weights=False)
  family = family_of(config)
  options.pop('seed', None)  # of what is fresh: values, which shapes have not
  form, targets = options.pop('quantize', None), options.pop('targets', '{linear}')
  left_out = dict.fromkeys(('num_classes', 'image_size', 'layers', 'pool', 'dropout'))
  model = _build(
    config, checkpoint, **{**left_out, 'dtype': 'float32', 'param_dtype': 'float32', **options}
  )
  params = {
    path: jax.ShapeDtypeStruct(shape, model.param_dtype)
    for path, shape in shapes_of(model, family).items()
  }
  variables = {'params': traverse_util.unflatten_dict(params, sep='/')}
  if form is not None:
    variables = jax.eval_shape(
      lambda held: quantized(model, form, held, *family.example(model), targets=targets), variables
    )
  return Pretrained(
    model,
    variables,
    family.describe(config, model),
    config['model_type'],
    _preprocess(folder, family, model),
    _file(folder if folder.is_file() else folder / 'tokenizer.json'),
    {},
  )


def _opened(folder: Path, weights: bool = True) -> tuple[Checkpoint | Gguf | None, dict[str, Any]]:
  """The weights of a folder or GGUF file, None if they are not needed and not there, and their
  config.
  """
  if folder.is_file():
    return (file := Gguf(folder)), file.config
  if not (folder / 'config.json').exists():
    raise FileNotFoundError(
      f'{folder} holds no config.json, so what kind of model it is is unknown'
    )
  config = files.read_json(folder / 'config.json')
  family_of(config)  # an unknown kind is told before its files are looked for
  if (folder / GGUF).exists():
    return Gguf(folder / GGUF), config
  there = weights or any((folder / name).exists() for name in (files.FILE, files.INDEX))
  return Checkpoint(folder) if there else None, config


def from_config(
  config: Mapping,
  *,
  num_classes: int | None = None,
  image_size: int | None = None,
  dtype: Any = 'float32',
  param_dtype: Any = 'float32',
  scan: bool = False,
  remat: Remat = False,
  layers: int | None = None,
  pool: str | None = None,
  dropout: float | None = None,
) -> nn.Module:
  """The model that a Hugging Face config describes, without weights; for arguments see `load`."""
  return _build(
    config,
    None,
    num_classes=num_classes,
    image_size=image_size,
    dtype=dtype,
    param_dtype=param_dtype,
    scan=scan,
    remat=remat,
    layers=layers,
    pool=pool,
    dropout=dropout,
  )


def check_decoder(pretrained: Pretrained) -> None:
  """Raises a ValueError if a backbone writes no text."""
  if not isinstance(pretrained.model, Llama):
    raise ValueError(
      f'a {pretrained.family} model writes no text; decoders are {", ".join(LLAMA_FAMILIES)}, such as '
      "'smollm2-135m'"
    )


def decoder_tokenizer(pretrained: Pretrained) -> Tokenizer:
  """The tokenizer of a backbone that writes text.

  Raises:
    ValueError: it is no decoder, or has no tokenizer that could serve.
  """
  check_decoder(pretrained)
  if pretrained.tokenizer is None:
    raise ValueError('there is no tokenizer.json beside the weights, so texts cannot be read')
  return load_tokenizer(pretrained.tokenizer)


def save_pretrained(
  folder: str | Path, model: nn.Module, variables: Mapping, config: Mapping
) -> None:
  """Writes model.safetensors and config.json as transformers writes them.

  Args:
    folder: where to; made if needed.
    model: as loaded, or of the same classes.
    variables: {'params': ...} of plain arrays, such as `Tuned.merge` returns.
    config: the `config` of a Pretrained.

  Raises:
    ValueError: a parameter has no place in this family's files.
  """
  family = family_of(config)
  table = family.table(model)
  params = traverse_util.flatten_dict(nn.meta.unbox(dict(variables['params'])), sep='/')
  tensors = to_tensors(params, table)
  headed = table.tied or any(path.split('/')[0] == 'head' for path in params)
  name = table.architectures[headed or not table.base]
  files.write_checkpoint(
    Path(folder), tensors, family.describe(config, model) | {'architectures': [name]}
  )


def family_of(config: Mapping) -> Family:
  """Raises ValueError for a model_type that has no family."""
  kind = config.get('model_type')
  if kind not in FAMILIES:
    near = nearest(kind, FAMILIES)
    hint = '' if near is None else f'; the nearest is {near!r}'
    raise ValueError(f'model_type {kind!r} is none of {", ".join(FAMILIES)}{hint}')
  return FAMILIES[kind]


def shapes_of(model: nn.Module, family: Family) -> dict[str, tuple[int, ...]]:
  """{path: shape} of a model's parameters."""
  tree = jax.eval_shape(model.init, jax.random.key(0), *family.example(model))['params']
  return {path: x.shape for path, x in traverse_util.flatten_dict(tree, sep='/').items()}


def _build(config, checkpoint, *, num_classes, image_size, layers, pool, dropout, **fields):
  fields |= {name: jnp.dtype(fields[name]) for name in ('dtype', 'param_dtype')}
  request = Request(num_classes, image_size, layers, pool, fields)
  build = family_of(config).build
  try:
    model = build(config, checkpoint, request)
  except KeyError as error:
    raise ValueError(
      f'the config of a {config["model_type"]} model needs {error}; this one has '
      f'{", ".join(sorted(config))}'
    ) from error
  return model if dropout is None else model.clone(dropout=dropout, attention_dropout=dropout)


def _fresh(shapes, checkpoint: Checkpoint, num_classes: int | None) -> set[str]:
  """What is not read: a new head, and the pooler below it where the files have none."""
  if num_classes is None:
    return set()
  pooled = any('pooler.' in key or 'classifier.dense.' in key for key in checkpoint.shapes)
  roots = ('head', 'head_distill', *(() if pooled else ('pooler',)))
  return {path for path in shapes if path.split('/')[0] in roots}


def _new(paths: set[str], shapes, seed: int, dtype) -> dict[str, jax.Array]:
  keys = jax.random.split(jax.random.key(seed), max(1, len(paths)))
  kernel = lambda key, shape: 0.02 * jax.random.normal(key, shape, dtype)
  return {
    path: kernel(key, shapes[path]) if path.endswith('kernel') else jnp.zeros(shapes[path], dtype)
    for key, path in zip(keys, sorted(paths), strict=False)
  }


def _preprocess(folder: Path, family: Family, model) -> dict[str, Any] | None:
  if family.colours is None:
    return None
  file = folder / 'preprocessor_config.json'
  told = files.read_json(file) if file.exists() else {}
  return {
    'mean': tuple(told.get('image_mean', family.colours['mean'])),
    'std': tuple(told.get('image_std', family.colours['std'])),
    'image_size': model.image_size,
  }


def _file(path: Path) -> str | None:
  return str(path) if path.exists() else None
