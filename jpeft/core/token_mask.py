"""Which keys each query sees, told by one or two numbers a token.

Axes: B batch, N queries, M keys.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('places', 'texts', 'key_texts'),
  meta_fields=('keys', 'window', 'causal', 'before'),
)
@dataclasses.dataclass(frozen=True)
class TokenMask:
  """A mask for attention functions that is whole only where it is read.

  `jnp` functions and operators take it for the boolean array [B or 1, 1, N, M], False where a key
  is hidden; `dot_product_attention` makes some rows of it at a time.

  Attributes:
    places: [N], where each query stands among the keys.
    texts: [B, N], number of the text that each query belongs to; None if every row is one text.
    key_texts: the same of the keys, [B, M - before]; None if every row is one text.
    keys: M, of which all but `before` have a place.
    window: a query sees no key that stands further from it than window - 1; None for all.
    causal: whether a query sees no key behind its own place.
    before: keys in front of the first place, which every query sees.
  """

  places: jax.Array
  texts: jax.Array | None
  key_texts: jax.Array | None
  keys: int
  window: int | None = None
  causal: bool = True
  before: int = 0

  @classmethod
  def of_row(cls, length: int, texts: jax.Array | None, **fields) -> 'TokenMask':
    """The mask of whole rows [B, N]: every token is a query and a key."""
    return cls(jnp.arange(length), texts, texts, length, **fields)

  @property
  def shape(self) -> tuple[int, int, int, int]:
    batch = 1 if self.texts is None else self.texts.shape[0]
    return batch, 1, self.places.shape[0], self.keys

  @property
  def ndim(self) -> int:
    return 4

  @property
  def dtype(self):
    return jnp.dtype(bool)

  def with_more(self, count: int) -> 'TokenMask':
    """The mask with `count` keys more in front, which every query sees."""
    return dataclasses.replace(self, keys=self.keys + count, before=self.before + count)

  def whole(self) -> jax.Array:
    """Booleans [B or 1, 1, N, M]."""
    distances = self.places[:, None] - jnp.arange(self.keys - self.before)
    seen = jnp.ones((1, *distances.shape), bool)
    if self.causal:
      seen = seen & (distances >= 0)
    if self.window is not None:
      seen = seen & (abs(distances) < self.window)
    if self.texts is not None:
      seen = seen & (self.texts[:, :, None] == self.key_texts[:, None])
    seen = jnp.pad(seen, ((0, 0), (0, 0), (self.before, 0)), constant_values=True)
    return seen[:, None]

  def __jax_array__(self) -> jax.Array:
    return self.whole()

  def __and__(self, other) -> jax.Array:
    return self.whole() & jnp.asarray(other)

  __rand__ = __and__

  def __getitem__(self, index) -> jax.Array:
    return self.whole()[index]
