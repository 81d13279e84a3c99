"""Preferences: the loss by hand, what is read, and runs that learn them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jpeft
from jpeft import cli, data, models, planning, predict, tasks, training
from jpeft import config as config_lib
from jpeft.models import Llama
from jpeft.training.metrics import read_metrics
from tests.fixtures import leaves_equal, noisy
from tests.training import killing

N = 9
TOKENS = np.random.default_rng(0).integers(0, 50, (3, 2 * N)).astype(np.int32)
MASK = np.repeat(np.array([[1] * (N - 2) + [0] * 2 + [2] * N]), 3, 0).astype(np.int32)
LABELS = np.where((TOKENS % 3 == 0) | (MASK == 0), -1, (TOKENS * 7) % 50).astype(np.int32)
BATCH = {'tokens': TOKENS, 'token_mask': MASK, 'label': LABELS}
# (loss, beta, label smoothing, whether logits are whole)
LOSSES = [
  ('dpo', 0.3, 0.0, True),
  ('dpo', 0.1, 0.2, False),
  ('ipo', 0.4, 0.0, True),
]


@pytest.fixture(scope='module')
def attached():
  model = Llama(vocab=50, width=16, depth=2, heads=2, kv_heads=1, mlp_dim=24)
  backbone = noisy(model.init(jax.random.key(0), TOKENS[:, :N]), 0.1)
  tuned = jpeft.attach(model, jpeft.lora(2), backbone, TOKENS, mask=MASK)
  return model, tuned, backbone, noisy(tuned.init(jax.random.key(1), backbone), 0.3)


def by_hand(logps, reference, name, beta, smoothing):
  """The loss as trl writes it, of log-probabilities [B, 2] (of 'ipo' a token)."""
  ratios = (logps[:, 0] - reference[:, 0]) - (logps[:, 1] - reference[:, 1])
  if name == 'ipo':
    return (ratios - 1 / (2 * beta)) ** 2
  right = -jax.nn.log_sigmoid(beta * ratios) * (1 - smoothing)
  return right - jax.nn.log_sigmoid(-beta * ratios) * smoothing


@pytest.mark.parametrize(('name', 'beta', 'smoothing', 'whole'), LOSSES)
def test_loss_and_gradient_by_hand(name, beta, smoothing, whole, attached, monkeypatch):
  model, tuned, backbone, theta = attached
  if not whole:
    monkeypatch.setattr(tasks, 'MOST_LOGITS', 50)
  objective = _objective(name, beta, smoothing)
  forward = training.Forward(tuned, training=True)
  pieces, why = forward.in_pieces(BATCH, objective)
  assert (pieces is None) == whole and why == ''

  def mean(theta):
    losses, right = forward.losses(theta, backbone, BATCH, jax.random.key(2), objective)
    return losses.mean(), right

  def log_probabilities(theta):
    """[B, 2], a text at a time, in whole logits."""
    found = []
    for half in (slice(0, N), slice(N, 2 * N)):
      labels = LABELS[:, half]
      logits = tuned.apply(theta, backbone, TOKENS[:, half], mask=MASK[:, half] > 0)
      chosen = jax.nn.log_softmax(logits.astype(jnp.float32))
      chosen = jnp.take_along_axis(chosen, np.maximum(labels, 0)[..., None], -1)[..., 0]
      total = jnp.where(labels >= 0, chosen, 0).sum(-1)
      found.append(total / (labels >= 0).sum(-1) if name == 'ipo' else total)
    return jnp.stack(found, -1)

  # LoRA whose b is zero changes nothing.
  off = jax.tree_util.tree_map_with_path(lambda path, x: x * 0 if path[-1].key == 'b' else x, theta)
  reference = log_probabilities(off)

  def wanted(theta):
    logps = log_probabilities(theta)
    gaps = logps - reference
    return by_hand(logps, reference, name, beta, smoothing).mean(), gaps[:, 0] > gaps[:, 1]

  (loss, right), slope = jax.value_and_grad(mean, has_aux=True)(theta)
  (loss_by_hand, right_by_hand), slope_by_hand = jax.value_and_grad(wanted, has_aux=True)(theta)
  np.testing.assert_allclose(loss, loss_by_hand, rtol=2e-5)
  np.testing.assert_array_equal(right, right_by_hand)
  for found, hand in zip(jax.tree.leaves(slope), jax.tree.leaves(slope_by_hand), strict=True):
    np.testing.assert_allclose(found, hand, rtol=1e-3, atol=2e-5 * float(abs(hand).max()))
  # At the start of training h is 0: log 2 of dpo, 1 / (4 beta^2) of ipo.
  start, _ = forward.losses(off, backbone, BATCH, jax.random.key(2), objective)
  np.testing.assert_allclose(start, np.log(2) if name == 'dpo' else 1 / (4 * beta**2), rtol=1e-4)


def _objective(name='dpo', beta=0.1, smoothing=0.0):
  values = {'loss.name': name, 'loss.beta': beta, 'loss.label_smoothing': smoothing}
  return tasks.PREFERENCES.objective(_config('x', 'y', **values), {})


def _config(decoder, name, **overrides):
  values = {
    'task': 'preferences',
    'model.source': str(decoder),
    'data.name': name,
    'data.batch_size': 8,
    'data.max_length': 8,
    'method.name': 'lora',
    'method.rank': 4,
    'method.targets': '{linear}',
    'optimizer.lr': 2e-2,
    'steps': 60,
    'eval.every': 30,
    'log.every': 10,
    **overrides,
  }
  return config_lib.complete(config_lib.nest(values))


# ---- What is read.

USER, GOOD, BAD = (
  {'role': 'user', 'content': 'a b'},
  {'role': 'assistant', 'content': 'B A'},
  {'role': 'assistant', 'content': 'A B'},
)
HH = '\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:'
PLAIN = {
  'chosen': {'prompt': 'a', 'completion': ' B'},
  'rejected': {'prompt': 'a', 'completion': ' A'},
}
CHAT = {'chosen': {'messages': [USER, GOOD]}, 'rejected': {'messages': [USER, BAD]}}
LAYOUTS = {
  'plain': ({'prompt': 'a', 'chosen': ' B', 'rejected': ' A'}, PLAIN),
  'hh': (
    {'chosen': f'{HH} yes', 'rejected': f'{HH} no'},
    {
      'chosen': {'prompt': HH, 'completion': ' yes'},
      'rejected': {'prompt': HH, 'completion': ' no'},
    },
  ),
  'ultrafeedback': (
    {'prompt': 'a b', 'chosen': [USER, GOOD], 'rejected': [USER, BAD], 'score_chosen': 8.0},
    CHAT,
  ),
  'chats': ({'chosen': [USER, GOOD], 'rejected': [USER, BAD]}, CHAT),
  'trl': ({'prompt': [USER], 'chosen': [GOOD], 'rejected': [BAD]}, CHAT),
  'answers alone': ({'prompt': 'a b', 'chosen': [GOOD], 'rejected': [BAD]}, CHAT),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts_of_files_and_of_typed_columns(layout, tmp_path):
  values, wanted = LAYOUTS[layout]
  (tmp_path / 'train.jsonl').write_text(json.dumps(values) + '\n')
  source = data.load(f'preferences:{tmp_path}', 'train', labels='preferences')
  assert list(source) == [wanted]
  if layout not in ('chats', 'trl'):
    return
  pyarrow = pytest.importorskip('pyarrow')
  from pyarrow import parquet

  parquet.write_table(pyarrow.Table.from_pylist([values]), tmp_path / 'train.parquet')
  assert list(data.load(f'parquet:{tmp_path}', 'train', labels='preferences')) == [wanted]


@pytest.mark.parametrize(
  ('values', 'said'),
  [
    ({'prompt': 'a', 'chosen': 'b'}, "line 1 of .* has no 'rejected'"),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': [GOOD]}, 'the answers are two texts, or two lists'),
    ({'chosen': 'b', 'rejected': 'c'}, 'has no prompt, and its answers do not begin alike'),
    ({'chosen': [USER, GOOD], 'rejected': [GOOD, BAD]}, 'follow different messages'),
    ({'prompt': 'z', 'chosen': [USER, GOOD], 'rejected': [USER, BAD]}, 'none of the messages'),
    ({'chosen': [USER, GOOD, USER], 'rejected': [USER, BAD]}, "is of 'user', not 'assistant'"),
  ],
)
def test_what_is_no_preference_is_told_with_its_line_or_left_out(values, said, tmp_path):
  file = tmp_path / 'train.jsonl'
  file.write_text(json.dumps(values) + '\n' + json.dumps(LAYOUTS['plain'][0]) + '\n')
  with pytest.raises(ValueError, match=said):
    data.load(f'preferences:{tmp_path}', 'train', labels='preferences')
  name = f'preferences:{tmp_path}?malformed=skip'
  source = data.load(name, 'train', labels='preferences')
  assert list(source) == [PLAIN] and '1 malformed lines are left out' in source.notes[0]


def test_rows_learn_the_last_answer_alone(decoder):
  tokenizer = models.decoder_tokenizer(models.load(decoder))
  earlier = [{'role': 'user', 'content': 'd'}, {'role': 'assistant', 'content': 'D'}]
  pair = {
    part: {'messages': [*earlier, *CHAT[part]['messages']]} for part in ('chosen', 'rejected')
  }
  source = [pair, {**pair, 'rejected': pair['chosen']}]
  found = data.Pairs(source, tokenizer, 16)
  assert found.about.startswith('1 pairs') and '1 left out: both texts are alike' in found.about
  row = found[0]
  for half, answer in ((slice(0, 16), 'B A'), (slice(16, 32), 'A B')):
    labels = row['label'][half]
    learned = labels[labels >= 0].tolist()
    assert learned == [*tokenizer.encode(answer), tokenizer.eos]
    assert set(row['token_mask'][half]) - {0} == {1 if half.start == 0 else 2}
  with pytest.raises(ValueError, match='none has two different answers within its first 3 tokens'):
    data.Pairs(source, tokenizer, 3)


# ---- Runs.


@pytest.fixture(scope='module')
def answers(tmp_path_factory):
  """Prompts of two letters, after which an early capital is preferred to a late one."""
  file = tmp_path_factory.mktemp('answers') / 'answers.jsonl'
  lines = []
  for x in 'abcdefghij':
    for y in 'abcdefghij':
      if x != y:
        chosen, rejected = 'ABCDE'[len(lines) % 5], 'FGHIJ'[len(lines) // 5 % 5]
        lines.append({'prompt': f'{x} {y}', 'chosen': chosen, 'rejected': rejected})
  file.write_text('\n'.join(map(json.dumps, lines)))
  return f'preferences:{file}'


def test_a_run_learns_a_preference_and_goes_on_with_the_same_bits(
  decoder, answers, tmp_path, monkeypatch
):
  changes = {'loss.beta': 1.0, 'steps': 30, 'eval.every': 15}
  config = _config(decoder, answers, **changes)
  told = training.train(config, tmp_path / 'run')
  rows = read_metrics(tmp_path / 'run/metrics.jsonl')
  last = [row for row in rows if row['split'] == 'train'][-1]
  assert last['loss'] < 0.5 * np.log(2)  # log 2 before the first update
  assert told['eval']['accuracy'] > 0.9 and told['eval']['margin'] > 1
  margin = told['eval']['chosen_reward'] - told['eval']['rejected_reward']
  assert told['eval']['margin'] == pytest.approx(margin)
  assert '| accuracy |' in (tmp_path / 'run/report.md').read_text()

  with monkeypatch.context() as patch:
    killing.interrupt(patch, 20)
    with pytest.raises(cli.Stopped):
      training.train(config, tmp_path / 'other')
  training.train(config, tmp_path / 'other')
  same = [load_file(tmp_path / run / 'theta.safetensors') for run in ('run', 'other')]
  assert leaves_equal(*same)

  with pytest.raises(cli.Mistake, match='writes texts: python -m jpeft.generate'):
    predict.main(['--run', str(tmp_path / 'run'), '--input', 'x'])


def test_a_plan_has_the_pass_of_the_reference(decoder, answers):
  config = _config(decoder, answers)
  plans = planning.of_configs({'dpo': config}, planning.target('cpu'))
  # Forwards and backwards, and forwards once more.
  assert plans[0].flops > 2.7 * plans[0].forward and plans[0].trainable == 2048


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'method.start': 'runs/other'}, 'the reference of .* is the backbone alone'),
    ({'data.cache_features': True}, 'reads the model twice a step'),
    ({'eval.generate': 4}, 'preferences have none to compare with'),
    ({'method.name': 'eva', 'method.targets': '{q}'}, 'in a pass before training'),
    ({'data.name': 'phonemes'}, 'has no chosen and rejected answers'),
    ({'data.batch_size': 80}, 'pairs, fewer than the 80 of a batch'),
  ],
)
def test_what_does_not_go_with_preferences_is_told(changes, said, decoder, answers, tmp_path):
  with pytest.raises(Exception, match=said):
    training.train(_config(decoder, answers, **changes), tmp_path / 'run')


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'loss.name': 'mse'}, "'mse' is no loss of config.task='preferences', which has dpo, ipo"),
    ({'loss.name': 'ipo', 'loss.label_smoothing': 0.1}, 'has no labels that could be wrong'),
    ({'task': 'language', 'loss.beta': 0.2}, 'it is for preferences'),
    ({'task': 'regression', 'loss.name': 'dpo'}, 'is no loss of config.task='),
  ],
)
def test_wrong_values_of_the_config(changes, said):
  with pytest.raises(ValueError, match=said):
    _config('x', 'y', **changes)
