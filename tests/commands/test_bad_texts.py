"""Texts that a model cannot read are told before training and writing."""

import json
import shutil

import pytest
from tokenizers import Tokenizer

from jpeft import cli, generate, planning, training
from jpeft.data.source import digest


@pytest.fixture
def settings(language):
  """settings(**{dotted key: value}) -> a checked config."""
  own = {'method.name': 'norm', 'steps': 1, 'eval.metric': 'loss'}
  return lambda **overrides: language(**own | overrides)


@pytest.fixture
def larger(decoder, tmp_path):
  """The decoder, whose tokenizer was given two tokens more than the model has rows for."""
  folder = shutil.copytree(decoder, tmp_path / 'larger')
  tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
  tokenizer.add_tokens(['new'])
  tokenizer.add_special_tokens(['[PAD]'])
  tokenizer.save(str(folder / 'tokenizer.json'))
  return folder


def pairs(path, *rows):
  path.write_text(
    ''.join(json.dumps({'prompt': p, 'completion': c}) + '\n' for p, c in rows), encoding='utf-8'
  )
  return path


def test_tokens_that_the_model_has_no_row_for(settings, larger, tmp_path):
  (tmp_path / 'data').mkdir()
  pairs(tmp_path / 'data' / 'train.jsonl', *[('a b', 'c')] * 80)
  pairs(tmp_path / 'data' / 'test.jsonl', ('a', 'b'), ('a', 'b new'))
  changes = {'model.source': str(larger), 'data.name': f'completions:{tmp_path / "data"}'}
  told = "has the token 'new' with the number 24, and the model has rows for 24 tokens"
  with pytest.raises(cli.Mistake, match=f"example [01]: 'b new' {told}"):
    training.train(settings(**changes), tmp_path / 'run')
  with pytest.raises(cli.Mistake, match=f"'b new' {told}"):
    generate.main(['--model', str(larger), '--prompt', 'a', 'b new'])
  about = json.loads((larger / 'tokenizer_config.json').read_text())
  (larger / 'tokenizer_config.json').write_text(json.dumps(about | {'pad_token': '[PAD]'}))
  told = r"its end or padding has the token '\[PAD\]' with the number 25"
  with pytest.raises(cli.Mistake, match=told):
    training.train(settings(**{'model.source': str(larger)}), tmp_path / 'run')
  with pytest.raises(cli.Mistake, match=told):
    generate.main(['--model', str(larger), '--prompt', 'a'])


def test_rows_longer_than_the_model_and_too_few_rows(settings, tmp_path):
  long = settings(**{'data.max_length': 256})
  told = 'max_length is 256, more than the 128 positions that the'
  where = planning.target('cpu')
  with pytest.raises(cli.Mistake, match=told):
    training.train(long, tmp_path / 'run')
  with pytest.raises(ValueError, match=told):
    planning.of_configs({'norm': long}, where)
  classes = {'task': 'classification', 'eval.metric': 'accuracy', 'model.num_classes': 2}
  with pytest.raises(ValueError, match=told):
    planning.of_configs({'norm': settings(**classes, **{'data.max_length': 256})}, where)
  with pytest.raises(
    cli.Mistake, match=r'fills 3 rows, fewer than the 8 of a batch: 61 texts in 3 rows of 128'
  ):
    training.train(settings(**{'data.max_length': 128}), tmp_path / 'run')


def test_written_texts_where_some_have_no_words(settings, tmp_path):
  path = pairs(tmp_path / 'own.jsonl', *[(f'{x} {y}', '') for x in 'abc' for y in 'abcd'])
  with pytest.raises(cli.Mistake, match='all completions are empty'):
    training.train(settings(**{'data.name': f'completions:{path}'}), tmp_path / 'run')
  # The first of the test split have none, others have.
  (tmp_path / 'data').mkdir()
  rows = [(f'{x} {y}', 'A') for x in 'abcdefghi' for y in 'abcdefghi']
  pairs(tmp_path / 'data' / 'train.jsonl', *rows)
  pairs(tmp_path / 'data' / 'test.jsonl', *[('a', '')] * 9, ('b', 'A'))
  changes = {'data.name': f'completions:{tmp_path / "data"}', 'eval.generate': 1}
  told = training.train(settings(**changes), tmp_path / 'run')
  assert 'exact_match' in told['eval'] and 'word_error_rate' not in told['eval']


@pytest.mark.parametrize(
  ('prompt', 'said'),
  [
    ('', 'example 0 of the test split has an empty prompt'),
    ('a ' * 127, 'has a prompt of 127 tokens, which leaves no room for a completion in the 128'),
  ],
)
def test_prompts_that_cannot_be_continued(settings, tmp_path, prompt, said):
  (tmp_path / 'data').mkdir()
  rows = [(f'{x} {y}', 'A') for x in 'abcdefghi' for y in 'abcdefghi']
  pairs(tmp_path / 'data' / 'train.jsonl', *rows)
  pairs(tmp_path / 'data' / 'test.jsonl', (prompt, 'A B'), ('a', 'A'))
  changes = {'data.name': f'completions:{tmp_path / "data"}', 'eval.generate': 1}
  # The prompt comes first, whatever the hashes are.
  before = int(digest(prompt) > digest('a'))
  changes['data.test'] = f'test[{before}:]+test[:{before}]'
  with pytest.raises(cli.Mistake, match=said):
    training.train(settings(**changes), tmp_path / 'run')
