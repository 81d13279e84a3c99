"""LT-SFT: the numbers that full fine-tuning moves the most are trained, alone, from the start.

Ansell et al., 2022, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer" (arXiv 2110.07560);
official code cambridgeltl/composable-sft. With w0 all maskable numbers of the backbone:

  phase 1   all of w0 and the head are trained, w0 -> w1, in the pass before training
  choice    the k entries with the largest |w1 - w0|, over all arrays together
  rewind    to w0, and to the head as it was
  phase 2   w = w0 + D, D zero but for the k entries: the training itself

with the penalty l1 / N sum |w - w0| in both phases, N the number of parameters of the model. Adam
is begun anew for each phase, with a learning rate that falls linearly to 0 in phase 1. D of two
languages or tasks are added, by `chain(frozen(one, theta), other)`.

Optimizer and theta of phase 2 have k numbers. A kernel whose layer has an injection point gets no
gradient of its own size, see `sparse`; of vectors, tables of words and kernels without one a
gradient of the size of the array exists while its entries are read off. Phase 1 needs what full
tuning needs: three float32 arrays of the size of the backbone.

Deviations. Of equal changes those that come first are taken, so that there are k entries and not
more; numbers that did not change are never taken. One round of both phases, the default of the
official code. Phase 1 reads the model in evaluation, without dropout, and trains differences from
the backbone, which are 32-bit floats beside a backbone of 16 bits. Small differences are stored as
they are, where the official code drops those below 1e-7.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jpeft.core import (
  Found,
  Method,
  Pass,
  Preparation,
  Site,
  Sites,
  Weight,
  at,
  chain,
  early_updates,
  factory,
  prepared_by,
)

from ..check import require, whole
from ..ragged import Live, ragged, slots
from ..subset.tune import tune
from . import sparse

_HEAD = 'head of phase 1'
_MOST = 2**31  # numbers of one array of a layer


@factory
def lt_sft(
  count: int = 1_000_000,
  first_steps: int = 1000,
  first_lr: float = 5e-5,
  first_batch: int = 8,
  l1: float = 0.0,
  targets: str = '.*',
  skip: str = '',
  name: str = 'lt_sft',
) -> Method:
  """Lottery-ticket sparse fine-tuning. Phase 1 is a pass over training examples, see `prepare`.

  Args:
    count: k.
    first_steps: updates of phase 1.
    first_lr: its learning rate, which falls to 0.
    first_batch: examples of one of its updates.
    l1: factor of the penalty; 0.1 in the paper's language modelling, 0 for its tasks.
    targets: pattern of the sites whose arrays may be trained; the head is never among them, unless
      it is the table of words.
    skip: pattern of sites left out, such as '{norm}|{final_norm}'; '' for none.
    name: in theta.

  Raises:
    ValueError: a hyperparameter outside its range; at the pass, nothing that may be trained, or
      fewer numbers than `count`.
  """
  whole('lt_sft', 'count', count, 1)
  whole('lt_sft', 'first_steps', first_steps, 1)
  whole('lt_sft', 'first_batch', first_batch, 1)
  require(first_lr > 0, 'lt_sft', 'first_lr', first_lr, 'must be greater than 0')
  require(l1 >= 0, 'lt_sft', 'l1', l1, 'must be at least 0')
  made = _LtSft(count, first_steps, first_lr, l1, targets, skip, name)
  preparation = Preparation(
    'trains everything to choose entries',
    made.find,
    made.resolved,
    told,
    size=first_batch,
    batches=first_steps,
    again=True,
    bound=(
      f'planned as {count:,} entries spread over all arrays alike; where they are depends on a '
      'pass over the training examples, which itself needs the memory of full tuning'
    ),
  )
  return prepared_by(made.before(), preparation)


def told(found: Found) -> str:
  """What was chosen."""
  count, asked, numbers, _, _ = found['chosen'].tolist()
  arrays = sum(key.startswith('entries ') for key in found)
  text = f'trains {count:,} of {numbers:,} numbers, in {arrays} arrays'
  if count < asked:
    text += f'; no others of the {asked:,} that were asked for changed'
  return text


@dataclasses.dataclass(frozen=True, eq=False)
class _LtSft:
  """The pass and the rule of `lt_sft`; the fields are its arguments."""

  count: int
  first_steps: int
  first_lr: float
  l1: float
  targets: str
  skip: str
  name: str

  # Before the pass: entries in all arrays alike.

  def before(self) -> Method:
    return at(self.targets, self.rule(self.init_before))

  def init_before(self, key, site: Site, arrays) -> dict:
    if not _may(site, self.skip):
      return {}
    total = _numbers(one for one in site.model.find(self.targets) if _may(one, self.skip))
    t = {}
    for array in _floats(site):
      size = math.prod(site.leaves[array].shape)
      own = min(size, round(self.count * size / total))
      if own:
        t[array] = self.entries(_state(site, array, np.arange(own) * size // own))
    return t

  @staticmethod
  def entries(state) -> dict:
    one_each = state['at'] if 'at' in state else state['places']
    return {**state, 'delta': jnp.zeros(len(one_each))}

  # The pass.

  def find(self, examples: Pass) -> dict[str, np.ndarray]:
    """{'entries path array': [c, 2], layer and place, row by row, of each entry}, and numbers."""
    sites = {site.path: site for site in examples.find(self.targets) if _may(site, self.skip)}
    numbers = sum(
      math.prod(site.leaves[array].shape) * math.prod(site.theta_lengths)
      for site in sites.values()
      for array in _floats(site)
    )
    if self.count > numbers:
      raise ValueError(
        f'{self.name}: count={self.count:,} is more than the {numbers:,} numbers that may be '
        'trained'
      )
    changes = self.changes(examples)
    places = [(path, array) for path, own in changes.items() for array in own]
    flat = [changes[path][array].reshape(-1) for path, array in places]
    if not any(x.any() for x in flat):
      raise ValueError(
        f'{self.name}: phase 1 changed no number that may be trained: '
        f'first_lr={self.first_lr} is too small'
      )
    found = {}
    total = 0
    for (path, array), chosen in zip(places, most_changed(flat, self.count), strict=True):
      site = sites[path]
      size = math.prod(site.leaves[array].shape)
      if size >= _MOST:
        raise ValueError(
          f'{self.name}: {path}/{array} has {size:,} numbers, and 32 bits number 2^31: leave it '
          'out by skip='
        )
      if len(chosen):
        total += len(chosen)
        layer, place = np.divmod(chosen, size)
        found[f'entries {path} {array}'] = np.stack([layer, place], 1).astype(np.int32)
    paths = {key.split(' ')[1] for key in found}
    for path in sorted(paths):
      if sites[path].axes:
        found[f'layers {path}'] = np.array(math.prod(sites[path].theta_lengths))
    layers = sum(math.prod(sites[path].theta_lengths) for path in paths)
    everything = _numbers(examples.sites.values())
    found['chosen'] = np.array([total, self.count, numbers, everything, layers])
    return found

  def changes(self, examples: Pass) -> dict[str, dict[str, np.ndarray]]:
    """{path: {array: |w1 - w0|}}, of a stack [*theta_lengths, ...]."""
    parts = [at(self.targets, Weight(self.name, self.init_full, _plus), layers=examples.layers)]
    if _head(examples.sites):
      parts.append(tune('{head}', name=_HEAD, head=True))
    tuned = examples.attached(chain(*parts))
    tx = optax.adam(optax.linear_schedule(self.first_lr, 0, self.first_steps))
    factor = self.l1 / _numbers(examples.sites.values())

    def penalty(theta):
      if not factor:
        return 0.0
      return factor * sum(jnp.abs(x).sum() for x in jax.tree.leaves(theta[self.name]))

    theta = jax.jit(tuned.init)(examples.key, examples.backbone)
    steps = self.first_steps
    for now, _ in early_updates(examples, tuned, theta, tx, steps=steps, penalty=penalty):
      theta = now
    return examples.fetch(jax.jit(lambda t: jax.tree.map(jnp.abs, t))(theta[self.name]))

  def init_full(self, key, site: Site, arrays) -> dict:
    if not _may(site, self.skip):
      return {}
    return {array: jnp.zeros(site.leaves[array].shape) for array in _floats(site)}

  # After the pass.

  def resolved(self, found: Found) -> Method:
    chosen = {}
    stacks = {}
    for key, x in found.items():
      kind, *place = key.split(' ')
      if kind == 'entries':
        chosen.setdefault(place[0], {})[place[1]] = x
      elif kind == 'layers':
        stacks[place[0]] = int(x)
    filled: dict = {}

    def init(key, site: Site, arrays) -> dict:
      t = {}
      for array, x in chosen.get(site.path, {}).items():
        if (site.path, array) not in filled:
          layers = range(stacks.get(site.path, 1))
          states = [_state(site, array, x[x[:, 0] == layer, 1]) for layer in layers]
          filled[site.path, array] = sparse.filled(states)
        state = filled[site.path, array].items()
        t[array] = self.entries({name: site.one_layer(own, arrays.number) for name, own in state})
      return t

    live: dict[str, Live] = {
      path: {f'{array}/delta': slots(x[:, 0]) for array, x in chosen[path].items()}
      for path in stacks
    }
    _, _, _, everything, layers = found['chosen'].tolist()
    # The mean over all layers is added to the loss, and the penalty is their sum.
    return ragged(at(self.targets, self.rule(init, self.l1 / everything * layers)), live)

  def rule(self, init, penalty: float = 0.0) -> Weight:
    def of_layer(t):
      return penalty * sum(jnp.abs(own['delta']).sum() for own in t.values())

    return Weight(
      self.name,
      init,
      _with_entries,
      _product,
      exact=('*/delta',),
      penalty=of_layer if penalty else None,
    )


def most_changed(changes: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
  """Where the `count` largest numbers of several arrays are, none of them 0.

  Of equal ones those of earlier arrays and places are taken.

  Args:
    changes: flat arrays, none below 0.
    count: k; numbers that are 0 are not taken even if there are fewer others.

  Returns:
    The rising places in each array.
  """
  largest = np.zeros(0, np.float32)
  for x in changes:
    largest = np.concatenate([largest, x])
    if len(largest) > count:
      largest = np.partition(largest, len(largest) - count)[len(largest) - count :]
  least = largest.min()
  room = count - int((largest > least).sum())  # for numbers that equal the least
  places = []
  for x in changes:
    is_chosen = x > least
    if least > 0 and room:
      equal = np.flatnonzero(x == least)[:room]
      is_chosen[equal] = True
      room -= len(equal)
    places.append(np.flatnonzero(is_chosen))
  return places


# The rule.


def _state(site: Site, array: str, places: np.ndarray) -> dict[str, np.ndarray]:
  """The state of entries: for a kernel that of `sparse`, else 'places' in the array, row by row."""
  leaf = site.leaves[array]
  if not leaf.is_matrix or leaf.batch:
    return {'places': np.asarray(places, np.int32)}
  axes = np.unravel_index(places, leaf.shape)

  def along(own: Sequence[int]) -> np.ndarray:
    return np.ravel_multi_index([axes[i] for i in own], [leaf.shape[i] for i in own])

  return sparse.entries_of(along(leaf.ins), along(leaf.outs))


def _with_entries(t, site: Site, arrays) -> dict:
  made = {}
  for array, own in t.items():
    w = arrays[array]
    if 'places' in own:
      flat = w.reshape(-1).at[own['places']].add(own['delta'].astype(w.dtype))
      made[array] = flat.reshape(w.shape)
    else:
      leaf = site.leaves[array]
      made[array] = leaf.unfold(sparse.added(own, leaf.fold(w)))
  return made


def _product(t, x, y, w, key) -> jax.Array:
  return sparse.product(t[w.name], x, w()) if w.name in t else y


def _plus(t, site: Site, arrays) -> dict:
  return {name: (arrays[name] + x).astype(arrays[name].dtype) for name, x in t.items()}


# Of a model.


def _may(site: Site, skip: str) -> bool:
  """Whether a site's arrays may be trained."""
  left_out = [*_head(site.model), *(site.model.find(skip) if skip else ())]
  return site.owner not in {one.owner for one in left_out}


def _head(sites: Sites) -> list[Site]:
  """The head of a model; none where it is the table of words, or the family has none."""
  tables = {site.owner for site in sites.of_role('embed')}
  return [site for site in sites.of_role('head') if site.owner not in tables]


def _floats(site: Site) -> list[str]:
  return [a for a, leaf in site.leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _numbers(sites) -> int:
  """How many floats sites have, in all their layers."""
  return sum(
    math.prod(site.leaves[array].shape) * site.layers for site in sites for array in _floats(site)
  )
