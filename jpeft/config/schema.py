r"""Configurations: python files that read top to bottom, checked before the heavy imports.

    python -m jpeft.train --config=configs/quickstart.py:lora \
        --config.optimizer.lr=1e-3 --workdir=runs/a

A file defines `get_config(arg)` and returns nested values (a dict or an ml_collections.ConfigDict).
What it leaves out takes the default in FIELDS; what FIELDS does not know is an error that names the
nearest key. The keys of the `method` section are those of the method itself (`rank`, `tokens`,
...).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jpeft.messages import did_you_mean

REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Field:
  """One key of a configuration.

  Attributes:
    types: of its values.
    default: REQUIRED for none.
    doc: what it sets.
    must: what `check` demands, after the words 'must be'; also allowed values in words.
    check: whether a value of the right type is allowed.
  """

  types: tuple[type, ...]
  default: Any
  doc: str
  must: str = ''
  check: Callable[[Any], bool] = lambda value: True


TEXT = (str,)
_OPTIONAL_TEXT = (str, type(None))


def _flag(default, doc):
  return Field((bool,), default, doc)


def _choice(default, doc, *choices):
  listed = ', '.join(choices)
  return Field(TEXT, default, f'{doc}: {listed}', f'one of {listed}', lambda v: v in choices)


def _positive(kind, default, doc):
  types = (kind,)
  if default is None:
    types = (kind, type(None))
  return Field(types, default, doc, 'above 0', lambda v: v is None or v > 0)


def _not_negative(kind, default, doc):
  return Field((kind,), default, doc, 'at least 0', lambda v: v >= 0)


def _within(default, doc, low, high):
  return Field((float,), default, doc, f'from {low} to {high}', lambda v: low <= v <= high)


def _are_groups(value) -> bool:
  """Whether a sequence has pairs of a regex and a factor alone."""
  for pair in value:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
      return False
    pattern, factor = pair
    if not isinstance(pattern, str) or not isinstance(factor, (int, float)) or not factor >= 0:
      return False
  return True


def _are_class_weights(value) -> bool:
  """Whether it says what counts how much, see 'loss.class_weights'."""
  if value is None or isinstance(value, str):
    return value in (None, 'balanced')
  weights = value
  if value and isinstance(value[0], (list, tuple)):
    if any(not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in value):
      return False
    weights = [weight for _, weight in value]
  return len(weights) > 0 and all(_is_weight(weight) for weight in weights)


def _is_weight(value) -> bool:
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return is_number and 0 < value < math.inf


DISTANCES = ('mse', 'mae', 'huber')
COMPARISONS = ('dpo', 'ipo')
_LOSSES = {'regression': DISTANCES, 'preferences': COMPARISONS}
STORAGES = ('nf4', 'nf4_double', 'fp4', 'fp4_double', 'int4', 'int4_1', 'affine')

# Where the log of a run can go besides; those but csv need an extra of their name.
TRACKERS = ('tensorboard', 'csv', 'wandb', 'mlflow')

# Of labels; f1 is for two of them, pearson and spearman for labels in an order.
FURTHER_METRICS = ('f1', 'balanced_accuracy', 'matthews', 'pearson', 'spearman')

# Of texts that a model has written.
TEXT_METRICS = ('bleu', 'chrf', 'rouge1', 'rouge2', 'rougeL')
_ALSO = (*FURTHER_METRICS, *TEXT_METRICS)


class TaskKeys(NamedTuple):
  """What a configuration of one task may say.

  Attributes:
    learns: what is learnt, for the listing.
    metrics: those of jpeft that it has; the first decides which theta is best if nothing is said.
    losses: keys of the section `loss` that its loss reads.
    head: whether a fresh head is trained if `method.head` is left out.
    written: metrics of texts that the model writes, for `eval.also`.
    pretraining: keys of the section `pretraining` that it reads.
  """

  learns: str
  metrics: tuple[str, ...]
  losses: tuple[str, ...]
  head: bool = True
  written: tuple[str, ...] = ()
  pretraining: tuple[str, ...] = ()


TASKS = {
  'classification': TaskKeys(
    'a label each input',
    ('accuracy', 'macro_f1', 'loss', *FURTHER_METRICS),
    ('label_smoothing', 'class_weights', 'focal'),
  ),
  'multilabel': TaskKeys(
    'a set of classes each input',
    ('mean_average_precision', 'macro_f1', 'micro_f1', 'subset_accuracy', 'loss'),
    ('class_weights', 'focal'),
  ),
  'regression': TaskKeys(
    'one number or several each input',
    ('mse', 'rmse', 'mae', 'r2', 'pearson', 'spearman', 'loss'),
    ('name', 'standardize'),
  ),
  'language': TaskKeys(
    'texts to write',
    ('accuracy', 'perplexity', 'loss'),
    ('label_smoothing',),
    head=False,
    written=TEXT_METRICS,
  ),
  'preferences': TaskKeys(
    'which of two answers is preferred',
    ('accuracy', 'margin', 'loss'),
    ('name', 'beta', 'label_smoothing'),
    head=False,
  ),
  'tokens': TaskKeys(
    'a tag each word', ('f1', 'precision', 'recall', 'accuracy', 'loss'), ('label_smoothing',)
  ),
  'questions': TaskKeys('answers in a text', ('f1', 'exact_match', 'loss'), ()),
  'masked': TaskKeys(
    'words that are hidden', ('perplexity', 'accuracy', 'loss'), ('label_smoothing',), head=False
  ),
  'mae': TaskKeys(
    'pixels of patches that are hidden',
    ('loss',),
    (),
    head=False,
    pretraining=('hidden', 'width', 'depth'),
  ),
  'dino': TaskKeys(
    'views of an image, taught by a moving average of the model',
    ('loss',),
    (),
    head=False,
    pretraining=('crops', 'prototypes', 'momentum', 'width', 'depth'),
  ),
}
# The sections whose keys are of some tasks alone.
_OF_TASKS: dict[str, Callable[[TaskKeys], tuple[str, ...]]] = {
  'loss': lambda task: task.losses,
  'pretraining': lambda task: task.pretraining,
}
# Of all tasks, each once.
_METRICS = tuple(dict.fromkeys(name for task in TASKS.values() for name in task.metrics))

FIELDS: dict[str, Field] = {
  'task': _choice(
    'classification',
    'what is learnt (' + '; '.join(f'{name}: {task.learns}' for name, task in TASKS.items()) + ')',
    *TASKS,
  ),
  # The backbone.
  'model.source': Field(TEXT, REQUIRED, 'a folder with HF weights, a packaged name, or a hub id'),
  'model.num_classes': _positive(
    int, None, 'labels of the fresh head; the data say it if left out'
  ),
  'model.image_size': _positive(int, None, 'pixels; the checkpoint says it if left out'),
  'model.layers': _positive(int, None, 'keep the first n blocks'),
  'model.pool': Field(
    _OPTIONAL_TEXT, None, "what the head reads: 'cls', 'mean', ...; the family's own if none"
  ),
  'model.dtype': _choice('float32', 'of the computation', 'float32', 'bfloat16', 'float16'),
  'model.param_dtype': _choice('float32', 'of the backbone', 'float32', 'bfloat16', 'float16'),
  'model.scan': _flag(False, 'one scanned stack of blocks: compiles faster'),
  'model.remat': Field(
    (bool, str),
    False,
    'recompute blocks in the backward pass: less memory; dots: all of them but '
    'their products with weights; packed, packed4: from inputs kept in 8 or 4 bits',
    "true, false, 'dots', 'packed' or 'packed4'",
    lambda v: v in (True, False, 'dots', 'packed', 'packed4'),
  ),
  'model.quantize': Field(
    _OPTIONAL_TEXT,
    None,
    f"4-bit format of the blocks' kernels; the method's own if left out: {', '.join(STORAGES)}",
    f'one of {", ".join(STORAGES)}, or None',
    lambda v: v is None or v in STORAGES,
  ),
  'model.kernels': _choice(
    'auto', 'what multiplies by 4-bit kernels; auto: Pallas where it is faster', 'auto', 'xla'
  ),
  'model.mlp_tokens': Field(
    (int, type(None)),
    None,
    'tokens of each example that an MLP runs on at a time, which needs less memory; all if left '
    'out',
    'a number of tokens from 1 on, or None',
    lambda v: v is None or v >= 1,
  ),
  'model.dropout': Field(
    (float, type(None)),
    None,
    "every dropout rate of the backbone; the checkpoint's if left out",
    'from 0 to 1',
    lambda v: v is None or 0 <= v <= 1,
  ),
  # The examples.
  'data.name': Field(
    TEXT,
    REQUIRED,
    'mnist5k, animal_shapes, emoji_groups, emoji_3d, movie_sentiment, phonemes, folder:PATH, '
    'lists:PATH, vtab:PATH, fgvc:PATH, glue:PATH, csv:PATH, jsonl:PATH, completions:PATH, '
    'preferences:PATH, conll:PATH, squad:PATH, text:PATH, parquet:PATH, arrow:PATH, wds:PATH, '
    'hf:NAME or tfds:NAME',
  ),
  'data.train': Field(TEXT, 'train', "split to train on, such as 'train[:1000]'"),
  'data.test': Field(TEXT, 'test', 'split to evaluate on'),
  'data.dir': Field(_OPTIONAL_TEXT, None, 'where prepared data lie'),
  'data.batch_size': _positive(int, 32, 'examples an update'),
  'data.eval_batch_size': _positive(
    int, None, 'examples an evaluation step; batch_size if left out'
  ),
  'data.max_length': _positive(int, 128, 'tokens kept of a text; of a row of texts to write'),
  'data.stride': Field(
    (int, type(None)),
    None,
    'tokens that windows of a long text share, of questions; a quarter of max_length if left out',
    'at least 0',
    lambda v: v is None or v >= 0,
  ),
  'data.masked': Field(
    (float,),
    0.15,
    'share of the words that are chosen to be named, of masked words',
    'above 0, up to 1',
    lambda v: 0 < v <= 1,
  ),
  'data.pack': _flag(True, 'several texts to write a row, each seeing itself alone'),
  'data.chat': _flag(False, "give prompts and completions as a chat, by the tokenizer's template"),
  'data.augment': _choice('none', 'of training images', 'none', 'vtab', 'flip_crop', 'imagenet'),
  'data.resize': _choice('squash', 'how images get their size', 'squash', 'crop'),
  'data.pixels': _choice(
    'checkpoint',
    'mean and deviation that images are brought to: that of the checkpoint, that of ImageNet, half '
    '(0.5 and 0.5), or none (pixels from 0 to 1)',
    'checkpoint',
    'imagenet',
    'half',
    'none',
  ),
  'data.shots': _positive(
    int, None, 'examples of each class that are drawn to train on; all of them if left out'
  ),
  'data.shots_seed': Field(
    (int, type(None)),
    None,
    'by which they are drawn, the same for all methods; that of the run if left out',
    'at least 0',
    lambda v: v is None or v >= 0,
  ),
  'data.on_error': _choice(
    'raise',
    'what to do with an example that cannot be read while training: stop after a checkpoint, or '
    'skip it, which is told, counted and reported',
    'raise',
    'skip',
  ),
  'data.in_memory': _flag(False, 'read every example once, at the start'),
  'data.cache_features': _flag(
    False,
    'run what comes before the first trained number once an example and '
    'keep what it gives, not once an epoch',
  ),
  # The method; its further keys are those of its factory.
  'method.name': Field(TEXT, REQUIRED, 'of the registry, such as lora or lst'),
  'method.head': Field(
    (bool, str, type(None)),
    None,
    "train the model's head as well; if left out, where it is fresh: not "
    'of a model that writes text. For vqt and head2toe also the pattern of the head',
    'true, false, or a pattern of modules',
    lambda v: v != '',
  ),
  'method.start': Field(
    _OPTIONAL_TEXT,
    None,
    'a run folder, or a theta file of one (.safetensors): theta starts as it is there, and what it '
    'lacks, such as the head of other labels, starts fresh',
  ),
  'method.start_head': _flag(
    True, 'take the head of method.start too, where it fits; false for a fresh one, as in PVP'
  ),
  'method.saved_bits': Field(
    (int, type(None)),
    None,
    'of a value that the backward pass keeps of a block; whole values if left out',
    '4, 8 or None',
    lambda v: v in (4, 8, None),
  ),
  # What a task of images alone trains beside the method, and drops at the end.
  'pretraining.hidden': Field(
    (float,),
    0.75,
    'share of the patches that are hidden, of mae',
    'between 0 and 1',
    lambda v: 0 < v < 1,
  ),
  'pretraining.crops': _not_negative(int, 2, 'small views beside two large ones, of dino'),
  'pretraining.prototypes': _positive(int, 4096, 'outputs of the head of dino'),
  'pretraining.momentum': _within(
    0.996, 'share of itself that the teacher of dino keeps; it rises to 1', 0.0, 1.0
  ),
  'pretraining.width': _positive(
    int, None, 'of the decoder of mae, 256 if left out; of the head of dino, 2048'
  ),
  'pretraining.depth': _positive(
    int, None, 'blocks of the decoder of mae, 4 if left out; layers of the head of dino, 3'
  ),
  # Training.
  'loss.label_smoothing': _within(0.0, 'share of the target given to all labels alike', 0.0, 1.0),
  'loss.class_weights': Field(
    (str, tuple, list, dict, type(None)),
    None,
    "how much a label of each class counts: 'balanced', a number for each class in order, or pairs "
    '((class, number), ...), the others having 1',
    "'balanced', numbers above 0, or pairs of a class and such a number",
    _are_class_weights,
  ),
  'loss.focal': _not_negative(
    float, 0.0, 'gamma of the focal loss, which counts less what is surely right; 0 for none'
  ),
  'loss.name': Field(
    _OPTIONAL_TEXT,
    None,
    f'of numbers, in units of their deviation: {", ".join(DISTANCES)}; of preferences: '
    f'{", ".join(COMPARISONS)}; the first if left out',
    f'one of {", ".join((*DISTANCES, *COMPARISONS))}',
    lambda v: v is None or v in (*DISTANCES, *COMPARISONS),
  ),
  'loss.beta': _positive(
    float, 0.1, 'of preferences: how much it costs to move away from the reference'
  ),
  'loss.standardize': _flag(
    True, 'learn numbers less their mean over their deviation in the training split'
  ),
  'optimizer.name': _choice(
    'adamw',
    'update rule',
    'adamw',
    'adamw_8bit',
    'adam',
    'sgd',
    'lion',
    'adafactor',
    'galore',
    'natural_galore',
    'muon',
  ),
  'optimizer.lr': _positive(float, 1e-3, 'learning rate at its highest'),
  'optimizer.weight_decay': _not_negative(float, 0.0, 'decoupled'),
  'optimizer.decay_vectors': _flag(False, 'decay biases, scales and other 1-d arrays too'),
  'optimizer.b1': _within(0.9, 'mean of the gradient (momentum of sgd)', 0.0, 1.0),
  'optimizer.b2': _within(0.999, 'mean of its square', 0.0, 1.0),
  'optimizer.eps': _positive(float, 1e-8, 'added to the root of the mean square'),
  'optimizer.clip_norm': _positive(float, None, 'largest global norm of the gradient of theta'),
  'optimizer.layer_decay': Field(
    (float,),
    1.0,
    'lr factor for each block further from the output',
    'above 0, up to 1',
    lambda v: 0 < v <= 1,
  ),
  'optimizer.groups': Field(
    (tuple, list),
    (),
    'lr factors: ((regex over theta paths, factor), ...)',
    'pairs (regex, factor of at least 0)',
    _are_groups,
  ),
  'optimizer.lora_plus': _positive(float, None, 'LoRA+: lr factor of the b matrices'),
  'optimizer.rank': _positive(int, 128, 'GaLore: rank of the projected gradients'),
  'optimizer.every': _positive(int, 200, 'GaLore: updates from one projection to the next'),
  'optimizer.basis': _choice('svd', 'GaLore: how a projection is found', 'svd', 'sketch'),
  'optimizer.scale': _positive(float, 0.25, 'GaLore: of the update'),
  'optimizer.history': _positive(int, 20, 'Natural GaLore: projected gradients that are kept'),
  'optimizer.matrices': Field(
    TEXT,
    '.*',
    'GaLore, Muon: regex for the paths of theta whose matrices they update; Adam the rest',
  ),
  'optimizer.accumulate': _positive(int, 1, 'micro-batches that a batch is cut into'),
  'optimizer.offload': _flag(
    False, 'keep its state in host memory between updates; a CPU has no other'
  ),
  'schedule.name': _choice('cosine', 'of the learning rate', 'cosine', 'linear', 'constant'),
  'schedule.warmup_steps': _not_negative(int, 0, 'updates of linear warm-up'),
  'schedule.warmup_fraction': _within(0.0, 'the same as a share of all updates', 0.0, 1.0),
  'schedule.final': _within(0.0, 'share of lr at the end', 0.0, 1.0),
  'steps': _positive(int, None, 'updates; or give epochs'),
  'epochs': _positive(float, None, 'passes over the training split; or give steps'),
  'seed': _not_negative(int, 0, 'of the head, theta, the order of the data and dropout'),
  # What a run reports and stores.
  'eval.every': _positive(
    int, None, 'updates between evaluations; an epoch of them if left out. One more at the end'
  ),
  'eval.metric': Field(
    _OPTIONAL_TEXT,
    None,
    f"that decides which theta is best; the task's first if left out: {', '.join(_METRICS)}",
    f'one of {", ".join(_METRICS)}',
    lambda v: v is None or v in _METRICS,
  ),
  'eval.also': Field(
    (tuple, list),
    (),
    f'metrics that are reported beside the usual ones: {", ".join(_ALSO)}',
    f'some of {", ".join(_ALSO)}',
    lambda v: all(name in _ALSO for name in v),
  ),
  'eval.patience': _positive(
    int,
    None,
    'evaluations in a row without a better eval.metric that end a run; if left out, it runs to its '
    'last update',
  ),
  'eval.generate': _not_negative(
    int, 0, 'prompts of the test split that are continued greedily at the end, and before'
  ),
  'eval.answer_tokens': _positive(int, 30, 'tokens that the answer of a question has at most'),
  'eval.no_answer': Field(
    (float, type(None)),
    None,
    'a question has no answer if the score of that is above that of the best span by more; if left '
    'out, every question has one',
  ),
  'checkpoint.every': _positive(int, 100, 'updates between checkpoints'),
  'checkpoint.keep': _positive(int, 2, 'checkpoints kept'),
  'log.every': _positive(int, 10, 'updates between lines of metrics.jsonl'),
  'log.to': Field(
    (tuple, list),
    (),
    f'trackers that get the lines of metrics.jsonl as well: {", ".join(TRACKERS)}',
    f'some of {", ".join(TRACKERS)}',
    lambda v: all(name in TRACKERS or name in _ALLOWED.get('log.to', ()) for name in v),
  ),
  'log.tensorboard': _flag(False, "the same as 'tensorboard' in log.to"),
  # Devices.
  'mesh.data': _positive(int, 1, 'devices that share a batch'),
  'mesh.model': _positive(int, 1, 'devices that share a copy of the backbone'),
  'mesh.sequence': _positive(int, 1, 'devices that share the tokens of each row of texts'),
  'mesh.backbone': _choice(
    'replicated',
    'whole on each device, cut over the model axis, or cut over both axes',
    'replicated',
    'sharded',
    'fsdp',
  ),
  'mesh.whole_below': _positive(
    int, 2**18, 'arrays with fewer numbers in one layer are whole on each device'
  ),
  'baseline': Field(
    _OPTIONAL_TEXT, None, 'also run the file with this argument, and print both as a table'
  ),
}
# Sections that take further keys.
OPEN = ('method',)
# {key: {value beside those of FIELDS: the task that it is for, None for any}}, of what was
# registered from outside jpeft.
_ALLOWED: dict[str, dict[str, str | None]] = {}


def allow(key: str, value: str, task: str | None = None) -> None:
  """Lets a key of a configuration take one value more, such as a metric that was registered.

  Args:
    key: of FIELDS.
    value: which `complete` then accepts.
    task: for which alone; for any if left out.
  """
  _ALLOWED.setdefault(key, {})[value] = task


def complete(values) -> ConfigDict:
  """A whole configuration from nested values: defaults filled in, every key and value checked.

  Args:
    values: nested dict or ConfigDict.

  Raises:
    ValueError: an unknown or missing key, or a value of the wrong type or range.
  """
  given = flatten(values)
  for key in given:
    check_key(key)
  out = {}
  for key, field in FIELDS.items():
    value = given.pop(key, field.default)
    if value is REQUIRED:
      raise ValueError(f'the config does not set {key!r}: {field.doc}')
    out[key] = _checked(key, field, value)
  out |= given  # the further keys of open sections
  if out['method.head'] is None:
    out['method.head'] = TASKS[out['task']].head
  if out['eval.metric'] is None:
    out['eval.metric'] = TASKS[out['task']].metrics[0]
  _check_task(out)
  _check_data(out)
  _check_optimizer(out)
  _check_schedule(out)
  return ConfigDict(nest(out)).lock()


def check_key(key: str, others: Iterable[str] = ()) -> None:
  """Raises a ValueError if a configuration has no such key.

  Args:
    key: dotted.
    others: what may have been meant, beside the keys of FIELDS.
  """
  section = key.split('.')[0]
  if key not in FIELDS and section not in OPEN:
    raise ValueError(f'unknown config key {key!r}{nearest(key, [*FIELDS, *others])}')


def _check_task(out: dict[str, Any]) -> None:
  task = TASKS[out['task']]
  foreign = {*_METRICS, *TEXT_METRICS} - {*task.metrics, *task.written}
  for key, names in (('eval.metric', [out['eval.metric']]), ('eval.also', out['eval.also'])):
    for name in names:
      registered_for = _ALLOWED.get('eval.metric', {}).get(name)
      if name in foreign or registered_for not in (None, out['task']):
        raise ValueError(f'config.{key}={name!r} is no metric of config.task={out["task"]!r}')
      if name in task.written and not out['eval.generate']:
        raise ValueError(
          f'config.{key} names {name!r}, a score of texts that the model writes: say how many by '
          'config.eval.generate'
        )
  for key, field in FIELDS.items():
    section, _, name = key.partition('.')
    if section not in _OF_TASKS or name in _OF_TASKS[section](task) or out[key] == field.default:
      continue
    readers = [other for other, keys in TASKS.items() if name in _OF_TASKS[section](keys)]
    raise ValueError(
      f'config.{key}={out[key]!r} says nothing to the loss of config.task={out["task"]!r}; it is '
      f'for {" and ".join(readers)}'
    )
  losses = _LOSSES.get(out['task'], ())
  if out['loss.name'] is not None and out['loss.name'] not in losses:
    raise ValueError(
      f'config.loss.name={out["loss.name"]!r} is no loss of config.task={out["task"]!r}, which has '
      f'{", ".join(losses)}'
    )
  if out['loss.name'] == 'ipo' and out['loss.label_smoothing']:
    raise ValueError(
      "config.loss.name='ipo' has no labels that could be wrong: leave out loss.label_smoothing"
    )
  if out['loss.focal'] and out['loss.label_smoothing']:
    raise ValueError(
      'config.loss.focal and config.loss.label_smoothing both change what is surely right: give one'
    )
  lengths = [key for key in ('steps', 'epochs') if out[key] is not None]
  if len(lengths) != 1:
    which = 'both' if lengths else 'neither'
    raise ValueError(f'the config must set either steps or epochs, not {which}')


def _check_data(out: dict[str, Any]) -> None:
  for batch, parts in (
    ('data.batch_size', 'optimizer.accumulate'),
    ('data.batch_size', 'mesh.data'),
    ('data.eval_batch_size', 'mesh.data'),
  ):
    if out[batch] is not None and out[batch] % out[parts]:
      raise ValueError(
        f'config.{batch}={out[batch]} is not divisible by config.{parts}={out[parts]}'
      )
  if out['mesh.sequence'] > 1:
    for key, what in (
      ('data.cache_features', 'features are computed and kept of whole rows'),
      ('eval.generate', 'what writes texts has a cache of whole rows'),
      ('model.mlp_tokens', 'the tokens of a piece lie side by side, on one device'),
    ):
      if out[key]:
        raise ValueError(
          f'config.{key}={out[key]} and config.mesh.sequence={out["mesh.sequence"]}: {what}, and '
          'the latter cuts rows; leave one of them out'
        )
  if out['data.cache_features'] and out['data.augment'] != 'none':
    raise ValueError(
      f'config.data.augment={out["data.augment"]!r} changes the images each epoch: with '
      "config.data.cache_features it must be 'none'"
    )


# Keys that some update rules alone read.
_OF_RULES = {
  'optimizer.rank': ('galore', 'natural_galore'),
  'optimizer.every': ('galore', 'natural_galore'),
  'optimizer.scale': ('galore', 'natural_galore'),
  'optimizer.basis': ('galore', 'natural_galore'),
  'optimizer.history': ('natural_galore',),
  'optimizer.matrices': ('galore', 'natural_galore', 'muon'),
}


def _check_optimizer(out: dict[str, Any]) -> None:
  for key, names in _OF_RULES.items():
    if out[key] != FIELDS[key].default and out['optimizer.name'] not in names:
      raise ValueError(
        f'config.{key}={out[key]!r} says nothing to config.optimizer.name='
        f'{out["optimizer.name"]!r}; it is for {" and ".join(names)}'
      )


def _check_schedule(out: dict[str, Any]) -> None:
  if out['schedule.warmup_steps'] and out['schedule.warmup_fraction']:
    raise ValueError(
      'the config sets both schedule.warmup_steps and schedule.warmup_fraction: give one'
    )


def _checked(key: str, field: Field, value):
  """The value, as a float where the key takes no integers.

  Raises:
    ValueError: the wrong type, or a value that is not allowed.
  """
  is_flag = isinstance(value, bool)  # which Python counts among the integers
  if float in field.types and isinstance(value, int) and not is_flag:
    value = float(value)
  if isinstance(value, dict) and dict in field.types:
    value = tuple((str(name), weight) for name, weight in value.items())
  if not isinstance(value, field.types) or (is_flag and bool not in field.types):
    kinds = ' or '.join(_type_name(kind) for kind in field.types)
    raise ValueError(f'config.{key} must be of type {kinds}, not {type(value).__name__} {value!r}')
  if isinstance(value, str) and value in _ALLOWED.get(key, ()):
    return value
  finite = not isinstance(value, float) or math.isfinite(value)
  if not finite or not field.check(value):
    raise ValueError(f'config.{key} must be {field.must or "finite"}, not {value!r}')
  return value


def _type_name(kind: type) -> str:
  if kind is type(None):
    return 'None'
  return kind.__name__


def flatten(values, prefix: str = '') -> dict[str, Any]:
  """{dotted key: value} of nested dicts; sequences are values."""
  if isinstance(values, ConfigDict):
    values = values.to_dict()
  if not isinstance(values, dict):
    raise ValueError(f'a config is a dict, not {type(values).__name__}')
  out = {}
  for key, value in values.items():
    if isinstance(value, ConfigDict):
      value = value.to_dict()
    if isinstance(value, dict) and not _is_value(f'{prefix}{key}'):
      out |= flatten(value, f'{prefix}{key}.')
    else:
      out[f'{prefix}{key}'] = value
  return out


def _is_value(key: str) -> bool:
  """Whether a dict is the value of a key, and no section."""
  return key in FIELDS and dict in FIELDS[key].types


def nest(flat: dict[str, Any]) -> dict:
  """The inverse of `flatten`."""
  out: dict = {}
  for key, value in flat.items():
    *sections, last = key.split('.')
    here = out
    for section in sections:
      here = here.setdefault(section, {})
      if not isinstance(here, dict):
        raise ValueError(f'config key {key!r}: {section!r} is a value, not a section')
    if isinstance(here.get(last), dict):
      keys = ', '.join(f'{key}.{name}' for name in here[last])
      raise ValueError(f'config key {key!r} is a section: set one of {keys}')
    here[last] = value
  return out


def nearest(word: str, known) -> str:
  """ "; did you mean ...?", or nothing if no known word is near."""
  return did_you_mean(word, known, 0.5)
