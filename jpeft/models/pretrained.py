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
from jpeft.quant import Format, check_implementation, coded, kernels
from jpeft.quant import quantize as quantized

from .bert import BERT_FAMILIES, Bert
from .config_keys import check_config
from .convnext import CONVNEXT_FAMILIES
from .deberta import DEBERTA_FAMILIES
from .families import Family, Request, built, described
from .gpt import GPT_FAMILIES, Gpt
from .heads import STORED, chosen, stored_heads
from .io import (
  GGUF_FILE,
  NPZ_SUFFIX,
  Checkpoint,
  Gguf,
  Table,
  Tokenizer,
  VitNpz,
  find,
  from_files,
  has_weights,
  load_tokenizer,
  read_json,
  to_tensors,
  write_checkpoint,
)
from .kin import KIN
from .llama import LLAMA_FAMILIES, Llama
from .modernbert import MODERNBERT_FAMILIES
from .nn import Remat
from .swin import SWIN_FAMILIES
from .t5 import T5, T5_FAMILIES
from .unread_keys import Noted, check_unread
from .vit import TOWER_FAMILIES, VIT_FAMILIES

_COLOURS = {'image_mean?': ([float], None), 'image_std?': ([float], None)}
FAMILIES: dict[str, Family] = {
  **VIT_FAMILIES,
  **TOWER_FAMILIES,
  **SWIN_FAMILIES,
  **CONVNEXT_FAMILIES,
  **BERT_FAMILIES,
  **T5_FAMILIES,
  **LLAMA_FAMILIES,
  **GPT_FAMILIES,
  **MODERNBERT_FAMILIES,
  **DEBERTA_FAMILIES,
}


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A backbone with its weights.

  Attributes:
    model: the Linen module.
    variables: {'params': ...}.
    config: the Hugging Face config, changed to what was requested.
    family: its model_type, a key of FAMILIES.
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
  head: str | None = STORED,
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
  implementation: str = 'auto',
) -> Pretrained:
  """Loads a backbone.

  Args:
    source: a folder with config.json and safetensors files (or model.gguf); a .gguf file; a .npz
      file of a ViT as its original JAX code writes it; the name
      of weights that a Python package carries ('dinov2-s14', 'minilm-l6', 'smollm2-135m'); or the
      id of a model on the Hugging Face hub ('org/name', needs huggingface_hub).
    num_classes: a number of labels makes a fresh head; None keeps the weights of the checkpoint's.
    head: what the head gives. 'stored' is that of the checkpoint, or 'classification' with
      num_classes. 'classification': a label each input; 'tokens': a label each token; 'questions':
      [B, N, 2], logits that an answer starts and ends at each token; 'masked': the word at each
      token; 'text': the next word, of decoders. None leaves the head out.
    image_size: side of the images in pixels; position tables are resized to it. None as trained.
    dtype: of the computation.
    param_dtype: of the weights.
    scan: stack the blocks and run them by nn.scan.
    remat: recompute each block in the backward pass; with 'dots' all of it but its products with
      weights, with 'packed' and 'packed4' from its input in 8 and in 4 bits.
    seed: of the fresh weights.
    layers: keep the first so many blocks (T5: of each stack).
    pool: what a head of one label an input reads, or what is returned without one: 'cls', 'mean',
      'cls_mean' (images only), 'attention' (SigLIP only), 'last' (decoders only) or 'tokens', all
      hidden states. None for the family's own: 'cls_mean' for a head of DINOv2 and DINOv3, 'mean'
      for BEiT and for sentence encoders such as MiniLM, 'attention' for SigLIP, 'last' for
      decoders, else 'cls'; a stored head reads what transformers gives it.
    dropout: every dropout rate of the model; None for those of the checkpoint's config.
    quantize: store kernels in 4 bits, such as `jpeft.nf4()`; they are read and coded one at a time.
    targets: pattern of the modules whose kernels are stored so.
    implementation: of the products with them, see `jpeft.quantize`.

  Returns:
    A `Pretrained`. Its model returns logits if it has a head, else the pooled feature.

  Raises:
    ValueError: the source is unknown, its tensors do not fit the model, or it has a head that jpeft
      does not have and nothing says to leave it out.
    FileNotFoundError: a file is missing.

  Example:
    >>> loaded = jpeft.load('dinov2-s14', num_classes=10, image_size=56)  # doctest: +SKIP
    >>> logits = loaded.model.apply(loaded.variables, images)  # doctest: +SKIP
  """
  folder, origin = find(source)
  checkpoint, config = _opened(folder)
  family = family_of(config)
  model = from_config(
    config,
    checkpoint=checkpoint,
    num_classes=num_classes,
    head=head,
    image_size=image_size,
    dtype=dtype,
    param_dtype=param_dtype,
    scan=scan,
    remat=remat,
    layers=layers,
    pool=pool,
    dropout=dropout,
  )
  shapes = shapes_of(model, family)
  # Only if a size was requested: else a table of another size is an error.
  edits = {}
  if image_size is not None:
    edits = family.edits(config, model)
  coders = {}
  if quantize is not None:
    coders = _coders(model, family, quantize, targets, implementation)
  fresh = set()
  if num_classes is not None:
    fresh = _fresh(shapes, checkpoint, family.table(model))
  params = from_files(
    checkpoint,
    family.table(model),
    shapes,
    fresh=fresh,
    layers=layers,
    param_dtype=model.param_dtype,
    edits=edits,
    coded=coders,
  )
  params |= _initialised(fresh, shapes, seed, model.param_dtype)
  variables = {'params': traverse_util.unflatten_dict(params, sep='/')}
  return _pretrained(folder, config, model, variables, {**origin, **checkpoint.files})


def describe(
  source: str | Path,
  *,
  seed: int = 0,
  quantize: Format | None = None,
  targets: str = '{linear}',
  implementation: str = 'auto',
  **options,
) -> Pretrained:
  """The result of `load` with the same arguments, as shapes.

  No weights are read, nor fetched from the hub. A folder with config.json alone will do; the parts
  that only tensors show (a pooler, a head) are then left out.
  """
  del seed  # shapes do not depend on it
  folder, _ = find(source, weights=False)
  # Weights that are there are opened for the names and shapes of their tensors alone.
  checkpoint, config = _opened(folder, weights=False)
  family = family_of(config)
  model = from_config(config, checkpoint=checkpoint, **options)
  params = {
    path: jax.ShapeDtypeStruct(shape, model.param_dtype)
    for path, shape in shapes_of(model, family).items()
  }
  variables = {'params': traverse_util.unflatten_dict(params, sep='/')}
  if quantize is not None:
    example = family.example(model)
    options = {'targets': targets, 'implementation': implementation}
    code = lambda variables: quantized(model, quantize, variables, *example, **options)
    variables = jax.eval_shape(code, variables)
  return _pretrained(folder, config, model, variables, files={})


def has_head(source: str | Path, head: str, *, weights: bool = True) -> bool:
  """Whether the files of a backbone have tensors of a head, such as 'questions'.

  Args:
    source: see `load`.
    head: its name.
    weights: whether weights may be fetched from the hub; those that are not there have no head.
  """
  folder, _ = find(source, weights=weights)
  checkpoint, config = _opened(folder, weights=weights)
  return checkpoint is not None and head in stored_heads(family_of(config).heads, checkpoint)


def _pretrained(
  folder: Path, config: Mapping, model: nn.Module, variables: dict, files: dict[str, str]
) -> Pretrained:
  """A `Pretrained` of a folder or file, with its config, preprocessing and tokenizer."""
  family = family_of(config)
  tokenizer = folder / 'tokenizer.json'
  if folder.is_file() and family.colours is None:
    tokenizer = folder
  return Pretrained(
    model=model,
    variables=variables,
    config=described(family, config, model),
    family=config['model_type'],
    preprocess=_preprocess(folder, family, model),
    tokenizer=str(tokenizer) if tokenizer.exists() else None,
    files=files,
  )


def _opened(folder: Path, weights: bool = True) -> tuple[Checkpoint | Gguf | None, dict[str, Any]]:
  """(checkpoint, config) of a folder, or of a GGUF or .npz file.

  The checkpoint may be None if no weights are needed and there are none.
  """
  if folder.is_file():
    file = VitNpz(folder) if folder.suffix == NPZ_SUFFIX else Gguf(folder)
    return file, file.config
  if not (folder / 'config.json').exists():
    raise FileNotFoundError(
      f'{folder} holds no config.json, so what kind of model it is is unknown'
    )
  config = read_json(folder / 'config.json')
  family_of(config)  # first, since an unknown kind explains more than a missing file
  check_config(config, str(folder / 'config.json'))
  if (folder / GGUF_FILE).exists():
    return Gguf(folder / GGUF_FILE), config
  if weights or has_weights(folder):
    return Checkpoint(folder), config
  return None, config


def from_config(
  config: Mapping,
  *,
  checkpoint: Checkpoint | Gguf | None = None,
  num_classes: int | None = None,
  head: str | None = STORED,
  image_size: int | None = None,
  dtype: Any = 'float32',
  param_dtype: Any = 'float32',
  scan: bool = False,
  remat: Remat = False,
  layers: int | None = None,
  pool: str | None = None,
  dropout: float | None = None,
) -> nn.Module:
  """The model of a Hugging Face config, without weights.

  Args:
    config: as in config.json.
    checkpoint: opened weights, which show parts that the config does not name (a head, a pooler);
      None leaves those out.
    num_classes: for this and the other arguments see `load`.

  Raises:
    ValueError: the model_type is unknown, the config lacks a value, or the arguments do not fit it.
  """
  fields = {
    'dtype': jnp.dtype(dtype),
    'param_dtype': jnp.dtype(param_dtype),
    'scan': scan,
    'remat': remat,
  }
  family = family_of(config)
  where = f'the config of a {config["model_type"]} model'
  check_config(config, where)
  head = chosen(head, num_classes, pool, family.heads, config, checkpoint)
  request = Request(num_classes, image_size, layers, pool, head, fields)
  try:
    noted = Noted(config)
    model = built(family, noted, checkpoint, request)
    check_unread(noted, where)
  except KeyError as error:
    raise ValueError(
      f'the config of a {config["model_type"]} model needs {error}; this one has '
      f'{", ".join(sorted(config))}'
    ) from error
  if dropout is None:
    return model
  rates = ('dropout', 'attention_dropout', 'embed_dropout', 'head_dropout')
  return model.clone(**{rate: dropout for rate in rates if hasattr(model, rate)})


def untied(pretrained: Pretrained) -> Pretrained:
  """The same backbone with a head of its own, a copy of the word table that was the head before.

  Adapters can then change the table and the head each in its own way. Weights are not copied but
  those of the head.

  Raises:
    ValueError: the head is not the word table.
  """
  if not getattr(pretrained.model, 'tied', False):
    raise ValueError(f'the head of this {pretrained.family} model is not its word table')
  params = pretrained.variables['params']
  table = params['embed']['embedding']  # [V, D]
  if hasattr(table, 'T'):
    kernel = table.T
  else:
    kernel = jax.ShapeDtypeStruct(table.shape[::-1], table.dtype)
  model = pretrained.model.clone(tied=False)
  return dataclasses.replace(
    pretrained,
    model=model,
    variables={**pretrained.variables, 'params': {**params, 'head': {'kernel': kernel}}},
    config=described(family_of(pretrained.config), pretrained.config, model),
  )


def is_decoder(model: nn.Module) -> bool:
  """Whether a model is a decoder, whatever its head."""
  return isinstance(model, (Llama, Gpt))


def check_decoder(pretrained: Pretrained) -> None:
  """Raises a ValueError if a backbone writes no text."""
  if is_decoder(pretrained.model):
    if pretrained.model.head != 'text':
      raise ValueError(
        f'a {pretrained.family} model with the head {pretrained.model.head!r} writes no text: load '
        "it with head='text'"
      )
  else:
    raise ValueError(
      f'a {pretrained.family} model writes no text; decoders are '
      f'{", ".join((*LLAMA_FAMILIES, *GPT_FAMILIES))}, '
      "such as 'smollm2-135m'"
    )


def decoder_tokenizer(pretrained: Pretrained) -> Tokenizer:
  """The tokenizer of a backbone that writes text.

  Raises:
    ValueError: it is no decoder, or has no tokenizer that can be read, or one whose padding or
      end-of-text token the model has no row for.
  """
  check_decoder(pretrained)
  if pretrained.tokenizer is None:
    raise ValueError('there is no tokenizer.json beside the weights, so texts cannot be read')
  tokenizer = load_tokenizer(pretrained.tokenizer)
  return dataclasses.replace(tokenizer, vocabulary=pretrained.model.vocab)


def save_pretrained(
  folder: str | Path, model: nn.Module, variables: Mapping, config: Mapping
) -> None:
  """Writes model.safetensors and config.json as transformers writes them.

  Sizes of blocks that its configs have no key for, such as other numbers of heads in each block,
  are written under a key of our own: `load` reads such a file, transformers refuses it.

  Args:
    folder: where to; made if needed.
    model: as loaded, or of the same classes.
    variables: {'params': ...} of plain arrays, such as `Tuned.merge` returns.
    config: the `config` of a Pretrained.

  Raises:
    ValueError: a parameter has no place in this family's files; or the vocabulary is not that of
      the config.
  """
  family = family_of(config)
  table = family.table(model)
  params = traverse_util.flatten_dict(nn.meta.unbox(dict(variables['params'])), sep='/')
  tensors = to_tensors(params, table)
  bare, headed = table.architectures
  architecture = bare
  # A tied head is part of the base model, and a family without a prefix has no bare model.
  if table.tied or not table.base or any(path.startswith('head/') for path in params):
    architecture = headed
  config = described(family, config, model) | {'architectures': [architecture]}
  write_checkpoint(Path(folder), tensors, config)


def departure(pretrained: Pretrained) -> str | None:
  """What transformers computes otherwise from the files of a model with labels; None for nothing.

  Its classes read a head from one place, and some put a layer in front of it.
  """
  model = pretrained.model
  if model.num_classes is None or getattr(model, 'head', 'classification') != 'classification':
    return None
  if isinstance(model, T5):
    return f'transformers has no class for a {pretrained.family} encoder with labels'
  config = {key: value for key, value in pretrained.config.items() if key != 'jpeft_pool'}
  plain = from_config(config, num_classes=model.num_classes)
  theirs = family_of(pretrained.config).their_pool or plain.pool
  if theirs != model.pool:
    return f'the classes of transformers read pool={theirs!r}, and this run {model.pool!r}'
  if isinstance(model, Bert) and not model.pooler:
    return 'the class of transformers has a pooler before the head, and this backbone has none'
  return None


def family_of(config: Mapping) -> Family:
  """The family of a config's model_type.

  Raises:
    ValueError: there is none.
  """
  kind = config.get('model_type')
  if not isinstance(kind, str):
    raise ValueError(f'model_type {kind!r:.60} is none of {", ".join(FAMILIES)}')
  if kind in FAMILIES:
    return FAMILIES[kind]
  hint = ''
  if kind in KIN:
    near, difference = KIN[kind]
    hint = f'; its nearest kin that loads is {near!r}: {kind} {difference}'
  elif (near := nearest(kind, FAMILIES)) is not None:
    hint = f'; the nearest is {near!r}'
  raise ValueError(f'model_type {kind!r} is none of {", ".join(FAMILIES)}{hint}')


def shapes_of(model: nn.Module, family: Family) -> dict[str, tuple[int, ...]]:
  """{path: shape} of a model's parameters."""
  variables = _abstract(model, family)
  params = traverse_util.flatten_dict(variables['params'], sep='/')
  return {path: array.shape for path, array in params.items()}


def _abstract(model: nn.Module, family: Family) -> dict[str, Any]:
  """The variables of a model, as shapes."""
  return jax.eval_shape(model.init, jax.random.key(0), *family.example(model))


def _coders(
  model: nn.Module, family: Family, form: Format, targets: str, implementation: str
) -> dict[str, Any]:
  """{path: function from a kernel's layers to its 4-bit form}, for the kernels of `targets`."""
  check_implementation(implementation)
  code = functools.partial(coded, implementation=implementation)
  sites = sites_of(model, _abstract(model, family), *family.example(model))
  found = kernels(sites, targets)
  return {path: functools.partial(code, form, *place) for path, place in found.items()}


def _fresh(shapes: Mapping, checkpoint: Checkpoint | Gguf, table: Table) -> set[str]:
  """The paths that a new head makes fresh: the head, and a pooler or its norm that files lack."""
  stored = {table.bare(key) for key in checkpoint.shapes}
  leaves = table.leaves()
  fresh = set()
  for path in shapes:
    root = path.split('/')[0]
    if root in ('head', 'head_distill'):
      fresh.add(path)
    elif root in table.fresh and leaves[path][0] not in stored:
      fresh.add(path)
  return fresh


def _initialised(paths: set[str], shapes: Mapping, seed: int, dtype: Any) -> dict[str, jax.Array]:
  """{path: fresh array}: small random kernels, scales of one, zeros elsewhere."""
  keys = jax.random.split(jax.random.key(seed), max(1, len(paths)))
  arrays = {}
  for key, path in zip(keys, sorted(paths), strict=False):
    if path.endswith('kernel'):
      arrays[path] = 0.02 * jax.random.normal(key, shapes[path], dtype)
    elif path.endswith('scale'):
      arrays[path] = jnp.ones(shapes[path], dtype)
    else:
      arrays[path] = jnp.zeros(shapes[path], dtype)
  return arrays


def _preprocess(folder: Path, family: Family, model: nn.Module) -> dict[str, Any] | None:
  """Mean and std of the pixels, from the files or the family's own, and the image size."""
  if family.colours is None:
    return None
  file = folder / 'preprocessor_config.json'
  stored = {}
  if file.exists():
    stored = read_json(file, _COLOURS)
  found: dict[str, Any] = {'image_size': model.image_size}
  for name in ('mean', 'std'):
    found[name] = tuple(stored.get(f'image_{name}') or family.colours[name])
    if len(found[name]) != 3 or name == 'std' and min(found[name]) <= 0:
      raise ValueError(f'{file}: image_{name}={list(found[name])!r:.60} is not of three colours')
  return found
