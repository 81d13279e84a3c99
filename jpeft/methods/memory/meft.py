"""MEFT: a pretrained network made reversible, so that the backward pass keeps nothing of its depth.

Liao et al., 2023, "Make Pre-trained Model Reversible: From Parameter to Memory Efficient
Fine-Tuning" (arXiv 2306.00477; BaohaoLiao/mefts). Two streams, both the embeddings at first, go
through layers

  y1 = a x1 + F(x2),  y2 = b x2 + G(y1),

and what is read is their mean. A is a bottleneck adapter, A(x) = f(x W_down + b) W_up + b':

  variant   F                                  G                                  then         a, b
  1         the block, A beside its MLP        A                                  they swap    0.1, 1
  2         A                                  the block, A beside its MLP        they swap    1, 0.1
  3         attention half, o <- o + A(o)      MLP half, A beside the MLP         -            0.1, 0.1

As a and b vanish and adapters start near zero, one of the streams follows the backbone:
`readout='last'` reads it, the mean is between the states before and behind the last block. Neither
starts as the backbone exactly.

What is kept: the last streams (float32), and those behind every `every`-th layer. An error of the
streams grows by about 1 / a a layer, in bfloat16 more quickly: `reconstruction_error` tells it;
with a = b = 1 it hardly grows, and the network starts far from the pretrained one. The blocks stand
where they were as identities, and the exit runs them.

Deviations. Dropout of the adapters is on their bottleneck, and no norm stands before them. Blocks
behind the first `reversible` ones run in one stream, the mean, with their adapters, and are kept as
ever. Variant 3 needs blocks that begin with norms. What a block returns beside its stream
(attention weights), and caches, are out of reach.
"""

import contextvars
import functools

import jax
import jax.numpy as jnp

from jpeft.core import Call, Method, Tuned, at, chain, factory

from ..adapter.bottleneck import Adapter
from ..nn import on_first, put_first
from ..side.stack import Stack
from .reversible import Layers, Reversible

# variant: (what F and G are, whether streams swap, scales, the stream that follows the backbone)
_VARIANTS = {
  1: (('block', 'adapter'), True, (0.1, 1.0), 1),
  2: (('adapter', 'block'), True, (1.0, 0.1), 0),
  3: (('attention', 'mlp'), False, (0.1, 0.1), 1),
}
READOUTS = ('mean', 'last')

# {path of an exit: errors}, while `reconstruction_error` runs.
_errors: contextvars.ContextVar[dict | None] = contextvars.ContextVar(
  'jpeft_meft_errors', default=None
)


@factory
def meft(
  bottleneck: int = 8,
  variant: int = 1,
  scales: tuple[float, float] | None = None,
  every: int | None = 2,
  reversible: int | None = None,
  readout: str = 'mean',
  activation: str = 'gelu',
  init: str = 'bert',
  dropout: float = 0.0,
  blocks: str = '{block}',
  attention: str | None = None,
  mlp: str = '{mlp}',
  exit: str = '{exit}',
  name: str = 'meft',
) -> Method:
  """MEFT (arXiv 2306.00477).

  Args:
    bottleneck: r of the adapters, two a layer.
    variant: 1, 2 or 3.
    scales: (a, b); the variant's own if left out.
    every: after how many layers streams are kept; None for the last alone.
    reversible: how many layers, the first ones, are; None for all.
    readout: 'mean' of the streams, or 'last', the stream that the blocks' outputs go to.
    activation: of the adapters.
    init: of the adapters, 'lora', 'bert' (as published) or 'houlsby'.
    dropout: rate on their bottleneck.
    blocks: pattern of the blocks.
    attention: pattern of the attention modules in them, of variant 3; {attention} if left out.
    mlp: pattern of the modules in them that an adapter runs beside.
    exit: pattern of the module whose output is the last hidden state, one for each stack.
    name: in theta: adapters beside MLPs (and in variant 3 behind attention) at these, the others at
      the exit, [layers, ...] each.

  Raises:
    ValueError: a hyperparameter outside its range; at `attach`, blocks that change the shape of
      their stream, or, for variant 3, that end with norms.
  """
  if variant not in _VARIANTS:
    raise ValueError(f'meft: variant={variant!r} is none of {", ".join(map(str, _VARIANTS))}')
  if readout not in READOUTS:
    raise ValueError(f'meft: readout={readout!r} is none of {", ".join(map(repr, READOUTS))}')
  (first, second), swap, own_scales, follows = _VARIANTS[variant]
  scales = own_scales if scales is None else tuple(scales)
  if len(scales) != 2 or not all(scales):
    raise ValueError(
      f'meft: scales={scales!r} must be two numbers other than 0, which the inverse divides by'
    )
  if every is not None and (int(every) != every or every < 1):
    raise ValueError(f'meft: every={every!r} must be a whole number, at least 1, or None')
  adapter = Adapter('meft', activation, init, dropout, bottleneck=bottleneck)

  @functools.lru_cache(maxsize=256)
  def stack(site) -> tuple[Stack, int]:
    """(the blocks, how many are reversible)."""
    net = Stack(site, blocks, exit)
    for block in net.stack:
      if block.input.shape != block.out.shape:
        raise ValueError(
          f'{name}: streams keep their shape, and the block {block.path!r} maps {block.input.shape} '
          f'to {block.out.shape}'
        )
    count = net.depth if reversible is None else reversible
    if not 0 < count <= net.depth:
      raise ValueError(
        f'{name}: reversible={reversible} must lie between 1 and the {net.depth} blocks before '
        f'{site.path!r}'
      )
    if variant == 3 and net.wraps_blocks:
      raise ValueError(
        f'{name}: variant 3 takes blocks apart that begin with norms, and those in {site.path!r} end '
        'with one'
      )
    return net, count

  def init(key, site, arrays):
    net, count = stack(site)
    if variant == 3:
      return {}
    block = net.stack[0]
    keys = jax.random.split(key, count)
    return jax.vmap(lambda key: adapter.init(key, block.input, block.out))(keys)

  def stand(t, call, *args, **kwargs):
    (_, x), *others = call.inputs(*args, **kwargs).items()
    leaves, tree = jax.tree.flatten(_shapes(call, args, kwargs))
    if len(leaves) != 1:
      raise ValueError(
        f'{name}: the block {call.site.path!r} returns {len(leaves)} arrays; only its stream can be '
        'made again'
      )
    call.tap(**dict(others))
    return jax.tree.unflatten(tree, [x])

  def part(beside, t, call, *args, **kwargs):
    """A module of a block with its adapter, or as nothing where the other half of the block
    runs.
    """
    if (call.outer or {}).get('running', beside) not in (beside, 'block'):
      return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), _shapes(call, args, kwargs))
    x = next(iter(call.inputs(*args, **kwargs).values()))
    return on_first(
      call(*args, **kwargs), lambda h: h + adapter.branch(t, call, x if beside == 'mlp' else h)
    )

  def run(t, call, x, *args, **kwargs):
    net, _ = stack(call.site)
    if not net.wraps_blocks:
      return call(through_blocks(t, call, x).astype(x.dtype), *args, **kwargs)
    y = call(x, *args, **kwargs)
    return put_first(y, through_blocks(t, call, jax.tree.leaves(y)[0]))

  def through_blocks(t, call, s):
    (net, count), dtype = stack(call.site), s.dtype
    own = {'t': t} if t else {}
    if own and dropout and (key := call.rng('meft dropout')) is not None:
      own['key'] = jax.random.split(key, count)

    def step(fn, running):
      """(row, x) -> what the block, a half of it, or an adapter alone gives."""

      def run(row, x):
        if running == 'adapter':
          return adapter.apply(row['t'], x.astype(dtype), row.get('key'))
        call.local['running'] = running
        return jax.tree.leaves(fn(row['arrays'], x.astype(dtype), **row['inputs']))[0]

      return run

    parts, behind, done = [], [], 0
    for block in net.stack:
      fn, arrays = call.layer(block, None if block.axes else 0)
      row, n = (
        {'arrays': arrays, 'inputs': call.taps()[block.path]},
        min(block.layers, max(count - done, 0)),
      )
      if block.axes:
        row['inputs'] = jax.tree.map(
          lambda x, b=block: x.reshape(b.layers, *x.shape[len(b.lengths) :]), row['inputs']
        )
      if n:
        mine = jax.tree.map(lambda x, at=slice(done, done + n) if block.axes else done: x[at], own)
        rows = _cut(row, block, 0, n) | mine
        parts.append(Layers(step(fn, first), step(fn, second), rows, n if block.axes else None))
      if n < block.layers:
        behind.append((step(fn, 'block'), _cut(row, block, n, block.layers), bool(block.axes)))
      done += block.layers

    wide = s.astype(jnp.promote_types(dtype, jnp.float32))
    streams = Reversible(parts, wide, scales, swap, every)
    if _errors.get() is not None:
      _errors.get()[call.site.path] = streams.errors((wide, wide))
    pair = streams((wide, wide))
    s = (sum(pair) / 2 if readout == 'mean' else pair[follows]).astype(dtype)
    for run, row, scanned in behind:
      one = lambda s, row, run=run: (run(row, s).astype(dtype), None)
      s, _ = jax.lax.scan(one, s, row) if scanned else one(s, row)
    return s

  inside = at(
    mlp,
    Call(
      name,
      functools.partial(part, 'mlp'),
      lambda key, site, a: adapter.init(key, site.input, site.out),
    ),
  )
  if variant == 3:
    behind = Call(
      name,
      functools.partial(part, 'attention'),
      lambda key, site, a: adapter.init(key, site.out, site.out),
    )
    inside = chain(inside, at(attention or '{attention}', behind))
  return chain(
    inside, at(blocks, Call(name, stand, taps=True)), at(exit, Call(name, run, init, taps=True))
  )


def reconstruction_error(tuned: Tuned, theta, backbone, *args, **kwargs) -> dict[str, jax.Array]:
  """How far the backward pass is off where it makes the streams again: {path of the exit:
  [reversible layers]}.

  The largest difference of the streams before a layer, in units of their largest entry. Above some
  percent (for the gradient is off by as much) keep streams more often (`every`), or take scales
  nearer to 1.

  Args:
    tuned: with `meft`.
    theta, backbone, *args, **kwargs: as for `tuned.apply`.

  Raises:
    ValueError: the method is not among those of `tuned`.
  """
  found = {}
  token = _errors.set(found)
  try:
    tuned.apply(theta, backbone, *args, **kwargs)
  finally:
    _errors.reset(token)
  if not found:
    raise ValueError(f'none of the methods {", ".join(tuned.method.names)} makes layers reversible')
  return found


def _shapes(call, args, kwargs):
  """What the wrapped call would return, as shapes."""
  fn, arrays = call.pure()
  return jax.eval_shape(lambda arrays: fn(arrays, *args, **kwargs), arrays)


def _cut(row, block, start: int, stop: int):
  """Some layers of a stack; of a block alone, the one."""
  return (
    jax.tree.map(lambda x: x[start:stop], row)
    if block.axes and stop - start < block.layers
    else row
  )
