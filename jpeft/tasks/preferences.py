"""Which of two answers is preferred: direct preference optimization, without a model of rewards.

Rafailov et al., 2023 (arXiv 2305.18290). Of a prompt x with a chosen answer c and a rejected r:

  reward(y)  = beta (log p(y | x) - log q(y | x))     q: the model without its method
  h          = reward(c) - reward(r)
  dpo        -(1 - s) log sigmoid(h) - s log sigmoid(-h)     s: the share of wrong labels, 0 if
                                                             left out (conservative DPO)
  ipo        (h / beta - 1 / (2 beta))^2, of mean log-probabilities a token (Azar et al., 2023,
             arXiv 2310.12036)

The reference q is the same frozen backbone under no rule, in a pass of its own without gradients:
it takes no memory for weights. Log-probabilities are sums over the tokens of an answer and come
from a head in pieces where logits are large (`in_pieces`).

Deviations. The paper's IPO has sums of log-probabilities; the mean a token is what trl has.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft import data, models
from jpeft.core import Tuned

from .losses import Objective
from .metrics import further_scores
from .modality import check_length
from .task import NO_FACTS, Facts, Task


@dataclasses.dataclass(frozen=True)
class Pairs:
  """What is made of the losses of two texts a row.

  Attributes:
    name: 'dpo' or 'ipo'.
    beta: how much it costs to move away from the reference.
    smoothing: s, of 'dpo'.
  """

  name: str = 'dpo'
  beta: float = 0.1
  smoothing: float = 0.0

  @staticmethod
  def texts(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays [B, 2 N] of a batch as [2 B, N], a text a row."""
    return {
      name: batch[name].reshape(2 * batch[name].shape[0], -1)
      for name in ('tokens', 'token_mask', 'label')
    }

  def rewards(self, losses: jax.Array, told: jax.Array, labels: jax.Array) -> jax.Array:
    """[B, 2] in float32: of the chosen and of the rejected answer.

    Args:
      losses: [2 B, N], of each token under the model.
      told: [2 B, N], the same under the reference.
      labels: [2 B, N], negative where a token is not of an answer.
    """
    learned = labels >= 0
    found = jnp.where(learned, told - losses, 0).sum(-1)
    if self.name == 'ipo':
      found /= learned.sum(-1)
    return self.beta * found.reshape(-1, 2)

  def losses(self, rewards: jax.Array) -> jax.Array:
    """[B] of rewards [B, 2]."""
    h = rewards[:, 0] - rewards[:, 1]
    if self.name == 'ipo':
      return jnp.square(h / self.beta - 1 / (2 * self.beta))
    wrong = self.smoothing
    return -(1 - wrong) * jax.nn.log_sigmoid(h) - wrong * jax.nn.log_sigmoid(-h)


def pairs_of(config) -> Pairs:
  """What the section `loss` says."""
  return Pairs(config.loss.name or 'dpo', config.loss.beta, config.loss.label_smoothing)


def objective(config, facts: Facts = NO_FACTS) -> Objective:
  """The loss of each pair, whose outputs are rewards [B, 2]."""
  pairs = pairs_of(config)
  return Objective(
    losses=lambda rewards, labels: pairs.losses(rewards),
    right=lambda rewards, labels: rewards[:, 0] > rewards[:, 1],
    weights=lambda labels: jnp.ones(labels.shape[0]),
    pairs=pairs,
  )


def source(config, split: str) -> data.Source:
  """The preferences of a split.

  Raises:
    ValueError, OSError, RuntimeError: no such data, or data without preferences.
  """
  if config.eval.generate:
    raise ValueError(
      f"config.eval.generate={config.eval.generate} scores texts of config.task='language'; "
      'preferences have none to compare with'
    )
  found = data.load(config.data.name, split, config.data.dir, 'preferences')
  if not config.data.in_memory:
    return found
  return data.in_memory(found, skip=config.data.on_error == 'skip')


def check(config, tuned: Tuned) -> None:
  """Raises a ValueError for what the comparison with a reference does not go with."""
  if tuned.has_loss:
    raise ValueError(
      f"config.task='preferences' has a loss of pairs, and {config.method.name} adds one of its own"
    )
  if config.data.cache_features:
    raise ValueError(
      "config.data.cache_features: config.task='preferences' reads the model twice a step: leave "
      'it out'
    )
  if config.method.start is not None:
    raise ValueError(
      f"config.method.start={config.method.start}: the reference of config.task='preferences' is "
      'the backbone alone, and not where the method starts: merge that run (jpeft merge) and give '
      'its folder as config.model.source'
    )


def rows(
  config, pretrained, source, training: bool, facts: Facts = NO_FACTS
) -> tuple[data.Pairs, None]:
  """(rows of a chosen and a rejected text, None).

  Raises:
    ValueError: texts longer than the model was made for, or fewer pairs than a batch.
  """
  check_length(config, pretrained)
  tokenizer = models.decoder_tokenizer(pretrained)
  found = data.Pairs(source, tokenizer, config.data.max_length, config.data.chat)
  if training and len(found) < config.data.batch_size:
    raise ValueError(
      f'the training split has {len(found)} pairs, fewer than the {config.data.batch_size} of a '
      f'batch: {found.about}; lower config.data.batch_size'
    )
  return found, None


def example(config, pretrained, outputs: int = 0) -> dict[str, np.ndarray]:
  """A batch of one empty pair.

  Raises:
    ValueError: the backbone is no decoder, or texts are longer than it was made for.
  """
  models.check_decoder(pretrained)
  check_length(config, pretrained)
  tokens = np.zeros((1, 2 * config.data.max_length), np.int32)
  mask = np.repeat(np.array([[1, 2]], np.int32), config.data.max_length, axis=1)
  return {'tokens': tokens, 'token_mask': mask, 'label': tokens}


def tally(rewards: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
  """The rewards [B, 2] themselves."""
  return {'rewards': rewards}


def judged(config, tally: dict[str, Any], rows) -> dict[str, Any]:
  """The tally with the loss of each pair."""
  rewards = jnp.asarray(tally['rewards'])
  return tally | {'losses': np.asarray(pairs_of(config).losses(rewards))}


def scores(
  tally: dict[str, np.ndarray], names: Sequence[str] = (), facts: Facts = NO_FACTS
) -> dict[str, float]:
  """Scores of pairs, and registered metrics.

  accuracy: the share of pairs whose chosen answer has the larger reward; margin: by how much, in
  the mean; chosen_reward and rejected_reward: means of both.
  """
  chosen, rejected = np.asarray(tally['rewards'], np.float64).T
  own = {
    'accuracy': float((chosen > rejected).mean()),
    'margin': float((chosen - rejected).mean()),
    'loss': float(np.mean(tally['losses'], dtype=np.float64)),
    'chosen_reward': float(chosen.mean()),
    'rejected_reward': float(rejected.mean()),
  }
  return own | further_scores('preferences', tally, names)


PREFERENCES = Task(
  source,
  rows,
  example,
  tally,
  scores,
  check=check,
  head='stored',
  outputs=lambda labels: 0,
  objective=objective,
  kept=('rewards',),
  judged=judged,
)
