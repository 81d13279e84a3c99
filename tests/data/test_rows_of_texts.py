"""Rows of words, of windows and of masked words, with a tokenizer that cuts words in pieces."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jpeft import data
from jpeft.data.windows import ABSENT

ARRAYS = ('tokens', 'token_mask', 'types')
MASK = 4


@pytest.fixture
def encode(encoder):
  """encode(length) -> an Encoder of the small BERT."""
  return lambda length=16, vocabulary=40: data.Encoder(
    encoder / 'tokenizer.json', length, vocabulary=vocabulary
  )


def source(examples, classes=()):
  return data.Source(examples.__getitem__, range(len(examples)), list(classes))


# ---- Words with tags.


def test_a_tag_is_at_the_first_token_of_its_word(encode):
  example = {'words': ['jane', 'sees', 'rome', '?'], 'label': [1, 0, 2, 0]}
  rows = data.TaggedWords(source([example], 'OPL'), encode(10), ARRAYS)
  row = rows[0]
  # [CLS] jan ##e sees ro ##me ? [SEP]
  assert row['label'].tolist() == [-1, 1, -1, 0, 2, -1, 0, -1, -1, -1]
  assert row['token_mask'].sum() == 8 and row['index'] == 0
  assert rows.of_words(0, np.arange(10)) == (0, {0: 1, 1: 3, 2: 4, 3: 6})
  assert rows.about == '1 sentences of 4 words'


def test_what_does_not_fit_is_counted(encode):
  examples = [
    {'words': list('abcdef'), 'label': [0] * 6},
    {'words': ['rome'] * 3, 'label': [0] * 3},  # the third is cut in half after its first token
    {'words': [' ', 'a'], 'label': [0, 1]},  # no token of its own
    {'words': [' '], 'label': [1]},
  ]
  rows = data.TaggedWords(source(examples, 'OX'), encode(7), ('tokens',))
  assert len(rows) == 3 and set(rows[0]) == {'tokens', 'label', 'index'}
  assert (rows[0]['label'] >= 0).sum() == 5 and (rows[1]['label'] >= 0).sum() == 3
  assert rows[2]['label'].tolist()[:2] == [-1, 1]
  assert '3 sentences of 9 words; 2 cut off after 7 tokens; 3 words cut off' in rows.about
  assert rows.about.endswith('1 sentences left out, without a token')


def test_words_get_the_tokens_that_they_have_in_a_text():
  """A byte-level tokenizer has the blank in the token of the next word."""
  vocabulary = {c: i for i, c in enumerate(['<pad>', 'a', 'b', 'o', 'Ġ', 'Ġa', 'Ġb', 'Ġo'])}
  merges = [('Ġ', 'a'), ('Ġ', 'b'), ('Ġ', 'o')]
  letters = {c: len(vocabulary) + i for i, c in enumerate('netw')}
  tokenizer = Tokenizer(models.BPE(vocabulary | letters, merges))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  rows = data.TaggedWords(
    source([{'words': ['a', 'ba', 'b'], 'label': [0, 1, 2]}], 'XYZ'),
    data.Encoder(tokenizer, 6),
    ARRAYS,
  )
  assert rows[0]['tokens'].tolist()[:4] == tokenizer.encode('a ba b').ids == [1, 6, 1, 6]
  assert rows[0]['label'].tolist() == [0, 1, -1, 2, -1, -1]


def test_tags_that_are_not_there(encode):
  for example, message in (
    ({'words': ['a'], 'label': [2]}, 'example 0: the tags 2 to 2; there are 2'),
    ({'words': ['a', 'b'], 'label': [1]}, 'example 0: 2 words have 1 tags'),
  ):
    with pytest.raises(ValueError, match=message):
      data.TaggedWords(source([example], 'OX'), encode(), ARRAYS)


# ---- Windows.


def test_windows_overlap_and_have_the_answer_where_it_is_whole(encode):
  context = 'a b c d e rome g h'
  example = {'question': 'in ?', 'context': context, 'answers': [('rome', 10)]}
  windows = data.Windows(source([example]), encode(10), 2, ARRAYS)
  # [CLS] in ? [SEP] + 5 tokens of the text + [SEP], two of them shared: a b c d e, d e ro ##me g,
  # ##me g h
  assert len(windows) == 3
  assert [w.label for w in windows.windows] == [ABSENT, (6, 7), ABSENT]
  assert windows.about == '1 questions in 3 windows, 2 of them without an answer'
  second = windows.windows[1]
  start, end = second.offsets[6, 0], second.offsets[7, 1]
  assert context[start:end] == 'rome'
  assert (second.offsets[:4] == -1).all() and second.offsets[-1].tolist() == [-1, -1]
  row = windows[1]
  assert row['label'].tolist() == [6, 7] and row['index'] == 0
  assert row['types'].tolist() == [0] * 4 + [1] * 6


def test_an_answer_that_begins_inside_a_token(encode):
  example = {'question': 'in ?', 'context': 'a oslo b', 'answers': [('slo b', 3)]}
  (window,) = data.Windows(source([example]), encode(), 2, ARRAYS).windows
  assert window.label == (5, 6)  # the whole of its tokens


def test_a_question_without_room(encode):
  example = {'question': 'a b c d e f', 'context': 'a', 'answers': []}
  with pytest.raises(ValueError, match="example 0: the question 'a b c d e f' leaves less room"):
    data.Windows(source([example]), encode(10), 4, ARRAYS)


# ---- Masked words.


def test_masks_are_of_words_alone_and_in_their_shares(encode, encoder):
  texts = [{'text': ' '.join('abcdefgh')}] * 200 + [{'text': 'a [SEP] xyz'}]
  encoded = encode(12)
  rows = data.MaskableTexts(source(texts), encoded, ARRAYS)
  mask = data.masking_of(encoded, encoder / 'tokenizer.json', 40, 0.25, False)
  chosen = masked = kept = 0
  for i in range(200):
    made = mask(rows[i], np.random.default_rng(i))
    places = made['label'] >= 0
    assert places.sum() == 2 and not places[[0, 9, 10, 11]].any()
    assert (made['tokens'][~places] == rows[i]['tokens'][~places]).all()
    assert (made['label'][places] == rows[i]['tokens'][places]).all()
    assert not np.isin(made['tokens'][places], [0, 1, 2, 3]).any()
    chosen += 2
    masked += (made['tokens'][places] == MASK).sum()
    kept += (made['tokens'][places] == made['label'][places]).sum()
  assert 0.74 < masked / chosen < 0.86 and 0.05 < kept / chosen < 0.16
  # Of what was written only 'a' is a word: [SEP] is special, and xyz unknown.
  made = mask(rows[200], np.random.default_rng(0))
  assert np.flatnonzero(made['label'] >= 0).tolist() == [1]


def test_evaluations_mask_alike_and_epochs_do_not(encode, encoder):
  encoded = encode(12)
  rows = data.MaskableTexts(source([{'text': ' '.join('abcdefgh')}] * 40), encoded, ARRAYS)
  path = encoder / 'tokenizer.json'
  fresh = data.masking_of(encoded, path, 40, 0.15, False)
  fixed = data.masking_of(encoded, path, 40, 0.15, True)
  both = []
  for mask in (fresh, fixed):
    batches = data.Batches(rows, 40, mask, shuffle=False)
    both.append([next(batches) for _ in range(2)])
  epochs, tests = [[batch['label'] for batch in found] for found in both]
  assert (epochs[0] != epochs[1]).any() and (tests[0] == tests[1]).all()
  assert (tests[0] != tests[0][0]).any()  # rows of one text differ
  assert set(both[0][0]) == {*ARRAYS, 'label', 'index'}


def test_long_texts_have_several_rows(encode):
  texts = [{'text': ' '.join('abcdefgh')}, {'text': '[PAD]'}]
  rows = data.MaskableTexts(source(texts), encode(6), ARRAYS)
  assert [rows[i]['tokens'].tolist()[1:5] for i in range(2)] == [[14, 15, 16, 17], [18, 19, 20, 21]]
  assert (
    rows.about == '1 texts of 8 tokens in 2 rows of up to 6; 1 left out, without a word to mask'
  )


def test_a_tokenizer_without_a_mask(tmp_path):
  tokenizer = Tokenizer(models.WordLevel({'[PAD]': 0, 'a': 1}, '[PAD]'))
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  with pytest.raises(ValueError, match=r'has no token for a masked word \(\[MASK\], <mask>\)'):
    data.mask_of(data.Encoder(tokenizer, 4), tmp_path / 'tokenizer.json')
  (tmp_path / 'tokenizer_config.json').write_text('{"mask_token": {"content": "a"}}')
  assert data.mask_of(data.Encoder(tokenizer, 4), tmp_path / 'tokenizer.json') == 1
