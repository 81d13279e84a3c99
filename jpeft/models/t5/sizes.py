"""The sizes of T5, for narrowing."""

from collections.abc import Mapping
from typing import Any

from ..nn import by_block
from ..sizes import Sized, Sizes, common, read_heads
from .files import example
from .model import T5, decoder_sizes, encoder_sizes
from .naming import T5_NAMING


def _sizes(model: T5) -> dict[str, Sizes]:
  sizes = {'encoder': _by_block(encoder_sizes(model), model.depth)}
  if model.head == 'text':
    decoder_depth = model.decoder_depth or model.depth
    sizes['decoder'] = _by_block(decoder_sizes(model), decoder_depth)
  return sizes


def _by_block(sizes: Mapping[str, Any], depth: int) -> Sizes:
  values = {}
  for name, size in sizes.items():
    if size is not None:
      values[name] = by_block(name, size, depth)
  values.setdefault('bias_heads', tuple(tuple(range(heads)) for heads in values['heads']))
  return Sizes(**values)


def _resized(model: T5, sizes: Mapping[str, Sizes], vocab: int | None) -> T5:
  encoder = sizes['encoder']
  vocab = vocab or model.vocab
  own = {
    'depth': len(encoder.heads),
    'heads': common(encoder.heads),
    'mlp_dim': common(encoder.mlp_dim),
    'bias_heads': read_heads(encoder),
  }
  if 'decoder' not in sizes:
    return model.clone(**own, vocab=vocab)
  decoder = sizes['decoder']
  return model.clone(
    **own,
    decoder_depth=len(decoder.heads),
    decoder_heads=_unless(decoder.heads, encoder.heads),
    cross_heads=_unless(decoder.cross_heads, decoder.heads),
    decoder_mlp_dim=_unless(decoder.mlp_dim, encoder.mlp_dim),
    decoder_bias_heads=read_heads(decoder),
    vocab=vocab,
  )


def _unless(values: tuple[int, ...], default: tuple[int, ...]) -> int | tuple[int, ...] | None:
  """The values of a field; None where they are those of the field that it follows."""
  if common(values) == common(default):
    return None
  return common(values)


def _words(model: T5) -> tuple[str, ...]:
  return ('embed', 'head') if model.head == 'text' else ('embed',)


T5_SIZES = Sized(T5, T5_NAMING, _sizes, _resized, example, _words)
