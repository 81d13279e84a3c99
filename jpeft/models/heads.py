"""Which head a model gets: that of its checkpoint, one that is asked for, or none."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .io import Checkpoint
from .nn import HEADS

# What is asked for by default.
STORED = 'stored'

# Heads by what follows 'For' in the names of transformers' classes.
_CLASSES = {
  'SequenceClassification': 'classification',
  'ImageClassification': 'classification',
  'ImageClassificationWithTeacher': 'classification',
  'TokenClassification': 'tokens',
  'QuestionAnswering': 'questions',
  'MaskedLM': 'masked',
  'CausalLM': 'text',
  'ConditionalGeneration': 'text',
}


class Heads(NamedTuple):
  """The heads of a model family.

  Attributes:
    known: {head: pattern of a key on disk, without prefix, that only such a head has}. Heads of one
      pattern are told apart by the class in the config.
    others: patterns of the keys of heads that jpeft does not have.
    default: the head that a model has without a tensor of it and without a class in the config: of
      decoders, whose head may be the word table.
  """

  known: Mapping[str, str]
  others: tuple[str, ...] = ()
  default: str | None = None


def chosen(
  asked: str | None,
  num_classes: int | None,
  pool: str | None,
  heads: Heads,
  config: Mapping,
  checkpoint: Checkpoint | None,
) -> str | None:
  """The head to build.

  Args:
    asked: a head, None for none, or STORED.
    num_classes: labels of a fresh head.
    pool: what is asked for; 'tokens' alone asks for hidden states.
    heads: of the family.
    config: of the checkpoint.
    checkpoint: opened weights, if there are any.

  Raises:
    ValueError: the family has no such head, the files have not what is asked for, or they have a
      head that jpeft does not have and nothing says to leave it out.
  """
  kind = config['model_type']
  if asked not in (None, STORED) and asked not in heads.known:
    problem = f'a {kind} model has no head {asked!r}'
    if asked not in HEADS:
      problem = f'head {asked!r} is unknown'
    raise ValueError(
      f'{problem}; {kind} has {", ".join(map(repr, heads.known))}, and None for no head'
    )
  if num_classes is not None:
    return _fresh(asked, num_classes, heads, kind)
  if asked is None or asked == STORED and pool == 'tokens':
    return None
  if asked == STORED:
    return _stored(heads, config, checkpoint)
  if asked == heads.default or checkpoint is None or asked in stored_heads(heads, checkpoint):
    return asked
  fresh = {'questions': '; num_classes=2 makes a fresh one', 'masked': ''}
  hint = fresh.get(asked, '; num_classes= makes a fresh one')
  raise ValueError(f'{checkpoint.folder} has no head {asked!r}{hint}')


def _fresh(asked: str | None, num_classes: int, heads: Heads, kind: str) -> str:
  """A head of so many labels."""
  if asked is None:
    raise ValueError(f'num_classes={num_classes} makes a fresh head, and head=None asks for none')
  head = asked
  if asked == STORED:
    head = 'classification'
  if head not in heads.known:
    raise ValueError(
      f'a {kind} model has no head {head!r} for num_classes={num_classes}; it has '
      f'{", ".join(map(repr, heads.known))}'
    )
  if head == 'questions' and num_classes != 2:
    raise ValueError(f"head 'questions' has 2 outputs, start and end, not {num_classes}")
  if head not in ('classification', 'tokens', 'questions'):
    raise ValueError(f'head {head!r} gives words: it takes no num_classes')
  return head


def _stored(heads: Heads, config: Mapping, checkpoint: Checkpoint | None) -> str | None:
  """The head that the files have."""
  name = (config.get('architectures') or [''])[0]
  head = _CLASSES.get(name.partition('For')[2])
  without = heads.default
  if name.endswith('LMHeadModel'):  # of GPT-2
    head = 'text'
  elif name.endswith('Model'):
    without = None
  if checkpoint is None:
    return without
  present = stored_heads(heads, checkpoint)
  others = _matching(heads.others, checkpoint)
  if head in present or head is not None and head == heads.default:
    return head
  if not present and not others:
    return without

  ways = [f'head={other!r} takes that part' for other in present if name.endswith('PreTraining')]
  ways += [f'head=None loads {config["model_type"]} without it', 'num_classes= makes a fresh head']
  if head in heads.known:
    raise ValueError(
      f'{checkpoint.folder} is said to be a {name} and has no tensor of such a head, but of '
      f'{", ".join(map(repr, present or others[:1]))}; {", ".join(ways)}'
    )
  if 'For' in name:
    raise ValueError(
      f'{checkpoint.folder} is a {name}, whose head jpeft does not have; {", ".join(ways)}'
    )
  if not present:
    raise ValueError(
      f'{checkpoint.folder} has a head that jpeft does not have, {others[0]!r}; {", ".join(ways)}'
    )
  first, *more = present
  if any(heads.known[first] != heads.known[other] for other in more):
    raise ValueError(
      f'{checkpoint.folder} has several heads, and its config names none of them: say head= one of '
      f'{", ".join(map(repr, present))}, or None'
    )
  return first


def stored_heads(heads: Heads, checkpoint: Checkpoint) -> list[str]:
  """The heads of which there are tensors."""
  return [head for head, pattern in heads.known.items() if _matching([pattern], checkpoint)]


def _matching(patterns: Iterable[str], checkpoint: Checkpoint) -> list[str]:
  """The keys that fit one of the patterns, with or without a prefix before them."""
  found = []
  for key in checkpoint.shapes:
    if any(re.fullmatch(rf'(\w+\.)?{pattern}', key) for pattern in patterns):
      found.append(key)
  return found
