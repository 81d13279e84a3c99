"""Text transforms, with a tokenizer of a few words."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jpeft import data
from jpeft import models as models_of_jpeft
from jpeft.data import text_transform

WORDS = ['[UNK]', '[CLS]', '[SEP]', 'a', 'good', 'film', '[PAD]']


def tokenizer(pad='[PAD]'):
  made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS[:-1] + [pad])}, '[UNK]'))
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  made.post_processor = processors.TemplateProcessing(
    '[CLS] $A [SEP]', '[CLS] $A [SEP] $B:1 [SEP]:1', [('[CLS]', 1), ('[SEP]', 2)]
  )
  return made


def test_padding_truncation_and_types(tmp_path):
  tokenizer().save(str(tmp_path / 'tokenizer.json'))
  for given in (tokenizer(), tmp_path / 'tokenizer.json', str(tmp_path / 'tokenizer.json')):
    fn = text_transform(given, 6)
    out = fn({'text': 'a good film', 'label': 1}, None)
    assert out['tokens'].tolist() == [1, 3, 4, 5, 2, 6]
    assert out['token_mask'].tolist() == [True] * 5 + [False]
    assert out['types'].tolist() == [0] * 6 and out['label'] == 1
    assert fn({'text': 'a a a a a a a a'})['tokens'].tolist() == [1, 3, 3, 3, 3, 2]
    assert {k: v.dtype.name for k, v in out.items() if k != 'label'} == {
      'tokens': 'int32',
      'token_mask': 'bool',
      'types': 'int32',
    }
  pair = text_transform(tokenizer(), 8)({'text': 'a film', 'pair': 'good', 'label': 0})
  assert pair['tokens'].tolist() == [1, 3, 5, 2, 4, 2, 6, 6]
  assert pair['types'].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
  assert set(pair) == {'tokens', 'token_mask', 'types', 'label'}


def test_the_tokenizer_given_stays_as_it_is():
  given = tokenizer()
  text_transform(given, 4)
  assert (
    given.padding is None and given.truncation is None and len(given.encode('a a a a a').ids) == 7
  )


def test_the_pad_token():
  own = tokenizer('<nothing>')
  own.enable_padding(pad_id=6, pad_token='<nothing>')
  assert text_transform(own, 4)({'text': 'a'})['tokens'].tolist() == [1, 3, 2, 6]
  assert text_transform(tokenizer('<pad>'), 4)({'text': 'a'})['tokens'].tolist() == [1, 3, 2, 6]
  assert text_transform(tokenizer(), 4, pad_token='a')({'text': 'film'})['tokens'].tolist() == [
    1,
    5,
    2,
    3,
  ]
  with pytest.raises(
    ValueError, match=r'has no pad token \(\[PAD\], .* are not in its vocabulary of 7\)'
  ):
    text_transform(tokenizer('<nothing>'), 4)
  with pytest.raises(ValueError, match=r'has no pad token \(b'):
    text_transform(tokenizer(), 4, pad_token='b')


def test_what_is_wrong_is_said(tmp_path):
  with pytest.raises(FileNotFoundError, match='there is no tokenizer file .*tokenizer.json'):
    text_transform(tmp_path / 'tokenizer.json', 4)
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(ValueError, match='config.json is no tokenizer.json'):
    text_transform(tmp_path / 'config.json', 4)
  with pytest.raises(ValueError, match='max_length=2 leaves no room beside 2 special tokens'):
    text_transform(tokenizer(), 2)


def test_arrays_stack():
  fn = text_transform(tokenizer(), 5)
  np.stack([fn({'text': text})['tokens'] for text in ('', 'a', 'a good film a good film')])


def test_tokens_and_segments_beyond_the_tables_are_named():
  for rows in (7, None):
    assert text_transform(tokenizer(), 4, vocabulary=rows)({'text': 'film'})['tokens'].max() == 6
  with pytest.raises(
    ValueError, match=r"the padding has the token '\[PAD\]' with the number 6, .*rows for 6 tokens"
  ):
    text_transform(tokenizer(), 4, vocabulary=6)
  fn = text_transform(tokenizer(), 4, pad_token='[SEP]', vocabulary=5)
  assert fn({'text': 'a good'})['tokens'].tolist() == [1, 3, 4, 2]
  with pytest.raises(ValueError, match="'a film' has the token 'film' with the number 5, and the"):
    fn({'text': 'a film'})

  one = text_transform(tokenizer(), 8, types=1)
  assert one({'text': 'a'})['types'].max() == 0
  with pytest.raises(ValueError, match='the second text of a pair the segment 1, and .* for 1:'):
    one({'text': 'a', 'pair': 'a'})


def test_all_texts_are_checked_where_the_tokenizer_knows_more_than_the_model(tmp_path):
  file = tmp_path / 'tokenizer.json'
  tokenizer().save(str(file))
  texts = [{'text': 'a'}] * 9 + [{'text': 'good film'}]
  options = {'pad_token': '[SEP]'}
  data.check_texts(texts, text_transform(file, 4, **options, vocabulary=7), file, 7)
  with pytest.raises(ValueError, match="example 9: 'good film' has the token 'film' with the"):
    data.check_texts(texts, text_transform(file, 4, **options, vocabulary=5), file, 5)


def test_texts_without_a_token_are_told_before_training(tmp_path):
  bare = tokenizer()
  bare.post_processor = None
  file = tmp_path / 'tokenizer.json'
  bare.save(str(file))
  fn = text_transform(file, 4, vocabulary=7)
  data.check_texts([{'text': 'a'}], fn, file, 7)
  with pytest.raises(ValueError, match="example 1: ' ' has no token, and a model cannot read"):
    data.check_texts([{'text': 'a'}, {'text': ' '}], fn, file, 7)


@pytest.mark.parametrize('text', ['a \ud83d', 3, None])
def test_what_is_no_text_is_named(text):
  with pytest.raises(ValueError, match='is no text that a tokenizer reads'):
    text_transform(tokenizer(), 4)({'text': text})
  with pytest.raises(ValueError, match='is no text that a tokenizer reads'):
    models_of_jpeft.Tokenizer(tokenizer(), 2, None, 6, None).encode(text)
