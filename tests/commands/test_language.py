"""Learning to write: scores, runs, and what is told of both."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from jpeft import cli, generate, merge, models, predict, tasks, training
from jpeft.tasks.language import distance
from jpeft.training import step
from jpeft.training.metrics import read_metrics

TASK = tasks.TASKS['language']


@pytest.fixture(scope='module')
def settings(language):
  """settings(**{dotted key: value}) -> a checked config."""
  own = {
    'method.name': 'full',
    'optimizer.lr': 1e-2,
    'steps': 4,
    'log.every': 1,
    'eval.metric': 'perplexity',
  }
  return lambda **overrides: language(**own | overrides)


@pytest.fixture(scope='module')
def learned(settings, tmp_path_factory):
  """A run that learnt to write letters backwards."""
  folder = tmp_path_factory.mktemp('learned') / 'run'
  changes = {'steps': 60, 'eval.generate': 12, 'log.every': 20, 'eval.every': 30}
  training.train(settings(**changes), folder)
  return folder


def test_scores_against_numpy():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 4, 7)).astype('float32')
  labels = np.array([[1, -1, 3, -1], [2, 2, -1, 6], [0, 1, 2, 3]])
  found = TASK.scores(
    TASK.tally(jnp.asarray(logits), jnp.asarray(labels), jnp.array([1.0, 1.0, 0.0]))
  )
  places = [(b, n) for b in (0, 1) for n in range(4) if labels[b, n] >= 0]
  chances = [np.exp(logits[p] - np.log(np.exp(logits[p]).sum()))[labels[p]] for p in places]
  assert found['loss'] == pytest.approx(-np.log(chances).mean(), rel=1e-5)
  assert found['perplexity'] == pytest.approx(np.exp(-np.log(chances).mean()), rel=1e-5)
  assert found['accuracy'] == pytest.approx(
    np.mean([logits[p].argmax() == labels[p] for p in places])
  )


@pytest.mark.parametrize(
  'a,b,edits',
  (
    ('', '', 0),
    ('K AE T', 'K AE T', 0),
    ('K AE', 'K AE T', 1),
    ('', 'K AE T', 3),
    ('K AH T S', 'K AE T', 2),
    ('AE T K', 'K AE T', 2),
    ('B D', 'K AE T', 3),
  ),
)
def test_edits(a, b, edits):
  assert distance(a.split(), b.split()) == distance(b.split(), a.split()) == edits


def test_a_run_says_what_was_before_and_what_is_after(learned):
  told = json.loads((learned / 'report.json').read_text())
  before, after = told['untuned'], told['eval']
  assert (
    set(before)
    == set(after)
    == {'perplexity', 'loss', 'accuracy', 'exact_match', 'word_error_rate'}
  )
  assert 15 < before['perplexity'] < 40 and after['perplexity'] < 1.3
  assert before['exact_match'] == 0 and after['exact_match'] >= 0.8
  assert before['word_error_rate'] > 0.8 and after['word_error_rate'] < 0.15
  rows = read_metrics(learned / 'metrics.jsonl')
  assert [(r['step'], r['split'], 'exact_match' in r) for r in rows if r['split'] != 'train'] == [
    (0, 'untuned', True),
    (30, 'test', False),
    (60, 'test', True),
  ]
  page = (learned / 'report.md').read_text()
  assert (
    '| perplexity ' in page and f'{before["perplexity"]:,.1f} -> {after["perplexity"]:,.1f}' in page
  )
  assert '- untuned: perplexity' in page and '- updates: 60 of 8 rows' in page
  about = json.loads((learned / 'run.json').read_text())
  assert about['labels'] == [] and about['reads'] == 'text'


def test_the_untuned_model_is_the_one_that_was_loaded(settings, learned):
  pretrained, tuned, _ = training.reopen(learned)
  whole = settings(**{'data.batch_size': 16})
  test = TASK.source(whole, 'test')
  rows, _ = TASK.rows(whole, pretrained, test, False)
  total, count = 0.0, 0
  for i in range(len(rows)):
    row = rows[i]
    logits = pretrained.model.apply(
      pretrained.variables, row['tokens'][None], mask=row['token_mask'][None]
    )[0]
    log, kept = jax.nn.log_softmax(logits), row['label'] >= 0
    total, count = total - log[np.flatnonzero(kept), row['label'][kept]].sum(), count + kept.sum()
  told = json.loads((learned / 'report.json').read_text())
  assert told['untuned']['loss'] == pytest.approx(float(total) / count, rel=1e-4)


def test_micro_batches_give_the_update_of_the_whole_batch(settings):
  """Their numbers of tokens to learn differ, so means of means would not."""
  pretrained, tuned = training.build(settings(), 0)
  theta = jax.jit(tuned.init)(jax.random.key(0), pretrained.variables)
  rng = np.random.default_rng(1)
  tokens = rng.integers(4, 24, (4, 6))
  labels = np.where(np.arange(6) < np.array([[1], [2], [5], [6]]), tokens, -1)
  batch = {'tokens': tokens, 'token_mask': np.ones((4, 6), np.int32), 'label': labels}
  found = []
  for parts in (1, 2):
    tx = optax.sgd(1.0)
    update = step.train_step(tuned, step.Forward(tuned, True), tx, 0, accumulate=parts)
    state = {
      'theta': theta,
      'optimizer': tx.init(theta),
      'step': jnp.zeros((), jnp.int32),
      'sums': step.zero_sums(),
    }
    state, out = jax.jit(update)(state, pretrained.variables, batch)
    found.append((state['theta'], out, step.means(state['sums'])))
  (one, out, mean), (two, out2, mean2) = found
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), one, two)
  np.testing.assert_allclose(out['loss'], out2['loss'], rtol=1e-5)
  assert mean['loss'] == pytest.approx(float(out['loss']), rel=1e-5) == mean2['loss']


def test_mlps_in_pieces_give_the_run_of_whole_ones(settings, tmp_path):
  thetas = []
  for tokens in (None, 5):
    changes = {'steps': 2, 'model.mlp_tokens': tokens, 'eval.generate': 1}
    training.train(settings(**changes), tmp_path / str(tokens))
    thetas.append(load_file(tmp_path / str(tokens) / 'theta.safetensors'))
  whole, pieces = thetas
  assert whole.keys() == pieces.keys()
  for name, x in whole.items():
    np.testing.assert_allclose(pieces[name], x, atol=1e-5)


def test_a_stopped_run_goes_on_with_the_same_rows(settings, tmp_path):
  whole = training.train(settings(**{'steps': 6, 'checkpoint.every': 3}), tmp_path / 'whole')
  half = tmp_path / 'half'
  training.train(settings(**{'steps': 6, 'checkpoint.every': 3}), half)
  for name in ('report.json', 'theta.safetensors', 'checkpoints/6'):
    path = half / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  again = training.train(settings(**{'steps': 6, 'checkpoint.every': 3}), half)
  assert again['theta_sha256'] == whole['theta_sha256'] and again['untuned'] == whole['untuned']


# ---- The command line.


def lines(capsys, main, *argv):
  capsys.readouterr()
  assert main([str(a) for a in argv]) == 0
  return capsys.readouterr().out.splitlines()


def test_generate_continues_prompts_of_a_run(learned, tmp_path, capsys, monkeypatch):
  got = lines(capsys, generate.main, '--run', learned, '--prompt', 'a b j', 'c c j', 'e a d j')
  assert got[:2] == ['B A', 'C C']  # shorter than the third, so padded
  assert lines(capsys, generate.main, '--run', learned, '--prompt', 'e a d j') == got[2:]
  (tmp_path / 'prompts.txt').write_text('g c j\n\nd e j\n')
  rows = [
    json.loads(x)
    for x in lines(
      capsys,
      generate.main,
      '--run',
      learned,
      '--input',
      tmp_path / 'prompts.txt',
      '--json',
      '--best',
    )
  ]
  assert rows == [
    {'prompt': 'g c j', 'completion': 'C G', 'tokens': 3},
    {'prompt': 'd e j', 'completion': 'E D', 'tokens': 3},
  ]
  monkeypatch.setattr(sys, 'stdin', ['b h j\n'])
  assert lines(capsys, generate.main, '--run', learned, '--input', '-', '--max_tokens', '1') == [
    'H'
  ]


def test_generate_samples_by_seed(decoder, capsys):
  draw = lambda seed: lines(
    capsys,
    generate.main,
    '--model',
    decoder,
    '--prompt',
    'a b',
    '--temperature',
    '1.0',
    '--max_tokens',
    '12',
    '--seed',
    seed,
  )
  assert draw(0) == draw(0) != draw(1)
  chat = lines(
    capsys,
    generate.main,
    '--model',
    decoder,
    '--chat',
    '--json',
    '--prompt',
    'a',
    '--max_tokens',
    '2',
  )
  assert json.loads(chat[0])['prompt'] == '<|user|> a <|end|> <|assistant|> '


def test_merged_weights_write_the_same(settings, tmp_path, capsys):
  changes = {'method.name': 'lora', 'method.targets': '{linear}', 'steps': 20}
  training.train(settings(**changes), tmp_path / 'run')
  merge.main(['--run', str(tmp_path / 'run'), '--out', str(tmp_path / 'out')])
  assert 'id2label' not in models.load(tmp_path / 'out').config
  asked = ('--json', '--prompt', 'a b j', 'c', '--max_tokens', '8')
  assert lines(capsys, generate.main, '--model', tmp_path / 'out', *asked) == lines(
    capsys, generate.main, '--run', tmp_path / 'run', *asked
  )


@pytest.fixture
def told(monkeypatch, capsys):
  """told(main, *argv) -> the one sentence that a failing command says."""

  def command(main, *argv):
    capsys.readouterr()
    monkeypatch.setattr(sys, 'argv', ['jpeft', *map(str, argv)])
    assert cli.command('jpeft', main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line

  return command


def test_what_cannot_write_is_told(told, learned, backbone, decoder, tmp_path):
  assert 'there is no run folder' in told(
    generate.main, '--run', tmp_path / 'none', '--prompt', 'a'
  )
  half = shutil.copytree(learned, tmp_path / 'half')
  (half / 'theta.safetensors').unlink()
  assert 'has no theta.safetensors: the run is not complete' in told(
    generate.main, '--run', half, '--prompt', 'a'
  )
  assert 'a vit model writes no text; decoders are llama' in told(
    generate.main, '--model', backbone, '--prompt', 'a'
  )
  assert 'is neither a folder' in told(generate.main, '--model', 'smollm3', '--prompt', 'a')
  assert 'there is no file' in told(
    generate.main, '--model', decoder, '--input', tmp_path / 'none.txt'
  )
  assert 'temperature=-1.0 must not be negative' in told(
    generate.main, '--model', decoder, '--prompt', 'a', '--temperature', '-1'
  )
  assert 'together more than the 128 that the model was made for' in told(
    generate.main, '--model', decoder, '--prompt', 'a', '--max_tokens', '128'
  )
  bare = shutil.copytree(decoder, tmp_path / 'bare')
  (bare / 'tokenizer_config.json').write_text('{}')
  assert 'names no end-of-text token' in told(generate.main, '--model', bare, '--prompt', 'a')
  (bare / 'tokenizer.json').unlink()
  assert 'there is no tokenizer.json' in told(generate.main, '--model', bare, '--prompt', 'a')
  assert 'python -m jpeft.generate --run' in told(predict.main, '--run', learned, '--input', 'x')


@pytest.mark.parametrize(
  'change,message',
  (
    ({'model.source': 'vit'}, 'a vit model writes no text'),
    ({'data.name': 'folder'}, 'has labels, and no texts to write'),
    (
      {'task': 'classification', 'eval.metric': 'loss'},
      "has no labels, but texts to write: set config.task='language'",
    ),
    ({'eval.metric': 'macro_f1'}, 'is no metric of'),
    ({'model.num_classes': 3}, 'has no labels'),
    ({'method.name': 'vpt_deep'}, 'data.pack=false'),
  ),
)
def test_configs_that_do_not_fit_are_explained(
  settings, backbone, images, tmp_path, change, message
):
  change = {
    k: {'vit': str(backbone), 'folder': f'folder:{images}'}.get(v, v) for k, v in change.items()
  }
  with pytest.raises((cli.Mistake, ValueError), match=message):
    training.train(settings(**change), tmp_path / 'run')
