"""Live against transformers: a folder of `jpeft merge`, opened alone, gives what the run gave."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from jpeft import config, decoding, merge, models, predict, training
from tests.commands.test_predict_merge import BERT, learn, reviews  # noqa: F401
from tests.runs import LLAMA

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings('ignore::DeprecationWarning')]


def ours(run, capsys, *inputs):
  """The probabilities [N, C] of `jpeft predict`."""
  capsys.readouterr()
  assert predict.main(['--run', str(run), '--json', '--input', *map(str, inputs)]) == 0
  rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  return np.array([list(row['probabilities'].values()) for row in rows])


def merged(run, folder, capsys):
  """Merges a run; returns what is printed."""
  capsys.readouterr()
  assert merge.main(['--run', str(run), '--out', str(folder)]) == 0
  return capsys.readouterr().out


def opened(kind, folder):
  """A model of transformers, which must find every tensor that it wants, and no other."""
  model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
  assert not any(report[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  return model.eval()


def theirs(model, inputs):
  """Its probabilities [N, C]."""
  with torch.no_grad():
    return torch.softmax(model(**inputs).logits, -1).numpy()


# ---- Images.


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """Photographs of other sizes than the model reads: colour, grey, smaller, JPEG."""
  folder = tmp_path_factory.mktemp('pictures')
  rng = np.random.default_rng(0)
  for name, shape in (('a.png', (37, 23, 3)), ('b.jpg', (20, 64, 3)), ('c.png', (30, 30))):
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
  Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / 'd.png')
  return sorted(folder.iterdir())


@pytest.mark.parametrize('resize', ['squash', 'crop'])
def test_images(resize, config_file, pictures, tmp_path, capsys):
  settings = {'steps': '20', 'eval.every': '20', 'data.resize': resize, 'optimizer.lr': '3e-2'}
  run = tmp_path / 'run'
  training.train(config.load(f'{config_file}:lora', settings), run)
  assert 'warning' not in merged(run, tmp_path / 'out', capsys)
  model = opened('AutoModelForImageClassification', tmp_path / 'out')
  assert model.config.id2label == {0: 'blue', 1: 'red'} and model.config.num_labels == 2
  assert model.config.problem_type == 'single_label_classification'
  processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / 'out')
  inputs = processor([Image.open(file) for file in pictures], return_tensors='pt')
  want = ours(run, capsys, *pictures)
  assert want.std(0).min() > 1e-3
  apart = np.abs(theirs(model, inputs) - want).max(1)
  if resize == 'crop':
    # b.jpg: transformers cuts the long side of 64 * 9 / 20 = 28.8 pixels, and does not round it.
    assert 1e-4 < apart[1] < 1e-3
    apart = np.delete(apart, 1)
  assert apart.max() < 1e-4


# ---- Texts.

TEXTS = ['a great plot', 'very poor film', 'a film very very very very good fine great', 'awful']


def labelled(folder):
  """The probabilities that transformers gives TEXTS, from the files of a folder."""
  model = opened('AutoModelForSequenceClassification', folder)
  assert model.config.id2label == {0: 'neg', 1: 'pos'} and model.config.label2id['pos'] == 1
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  inputs = tokenizer(TEXTS, padding=True, truncation=True, return_tensors='pt')
  assert inputs['input_ids'].shape[1] == 6  # of data.max_length
  return theirs(model, inputs)


def with_pooler(folder, own):
  """A copy of a BERT's folder, with a pooler."""
  shutil.copytree(folder, own)
  torch.manual_seed(0)
  transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(own)
  return own


def test_texts(reviews, config_file, tmp_path, capsys):  # noqa: F811
  folder, table = reviews
  run = tmp_path / 'run'
  learn(config_file, with_pooler(folder, tmp_path / 'bert'), table, run, **{'optimizer.lr': 3e-3})
  assert 'warning' not in merged(run, tmp_path / 'out', capsys)
  (tmp_path / 'texts.txt').write_text('\n'.join(TEXTS))
  want = ours(run, capsys, tmp_path / 'texts.txt')
  np.testing.assert_allclose(labelled(tmp_path / 'out'), want, atol=1e-4)
  label = transformers.pipeline('text-classification', str(tmp_path / 'out'))(TEXTS[0])
  assert label == [{'label': 'pos', 'score': pytest.approx(want[0, 1], abs=1e-4)}]


def test_what_transformers_computes_otherwise_is_told(
  reviews,  # noqa: F811
  config_file,
  tmp_path,
  capsys,
):
  folder, table = reviews
  learn(config_file, folder, table, tmp_path / 'run', **{'model.pool': 'mean'})
  told = merged(tmp_path / 'run', tmp_path / 'out', capsys)
  assert "transformers does not: the classes of transformers read pool='cls', and this" in told


def test_a_decoder_with_labels(reviews, config_file, tmp_path, capsys):  # noqa: F811
  folder, table = reviews
  llama = {**LLAMA, 'vocab_size': 12}
  model = models.from_config(llama)
  variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))
  models.save_pretrained(tmp_path / 'llama', model, variables, llama)
  shutil.copy(folder / 'tokenizer.json', tmp_path / 'llama')
  run = tmp_path / 'run'
  learn(config_file, tmp_path / 'llama', table, run)
  merged(run, tmp_path / 'out', capsys)
  (tmp_path / 'texts.txt').write_text('\n'.join(TEXTS))
  want = ours(run, capsys, tmp_path / 'texts.txt')
  np.testing.assert_allclose(labelled(tmp_path / 'out'), want, atol=1e-4)


def test_a_decoder_that_writes(language, tmp_path, capsys):
  run = tmp_path / 'run'
  training.train(language(**{'method.name': 'lora', 'steps': 60, 'optimizer.lr': 1e-2}), run)
  merged(run, tmp_path / 'out', capsys)
  model = opened('AutoModelForCausalLM', tmp_path / 'out')
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  pretrained, tuned, theta = training.reopen(run)
  own = models.decoder_tokenizer(pretrained)
  chat = [{'role': 'user', 'content': 'a b j'}]
  prompt = own.chat(chat)
  assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == prompt
  for text in ('a b j', 'c d j', prompt):
    ids = own.encode(text)
    inputs = tokenizer(text, return_tensors='pt', add_special_tokens=False)
    assert inputs['input_ids'].tolist() == [ids]
    with torch.no_grad():
      logits = model(**inputs).logits.numpy()
    want = tuned.apply(theta, pretrained.variables, np.array([ids]), deterministic=True)
    np.testing.assert_allclose(logits, want, atol=1e-4)
    # It ends where the run's texts end, by generation_config.json.
    (new,) = decoding.completions(
      tuned,
      pretrained.variables,
      [ids],
      new_tokens=12,
      theta=theta,
      stop=(own.eos,),
      pad=own.pad,
    )
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert written[0, len(ids) :].tolist() == new
  assert model.generation_config.eos_token_id == own.eos
