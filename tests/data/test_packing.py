"""From chats and prompts to rows of tokens: what is learnt, what shares a row, what a tokenizer
must have.
"""

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as parts

from jpeft import data, models
from jpeft.data.packing import IGNORED, encode

WORDS = ['<|end|>', '<|user|>', '<|assistant|>', '<s>', '[UNK]', *'abcdefgh']
ID = {word: i for i, word in enumerate(WORDS)}
TEMPLATE = (
  "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {{ eos_token }}\n{% endfor %}"
  '{% if add_generation_prompt %}<|assistant|> {% endif %}'
)


def tokenizer(template=TEMPLATE, words=WORDS, begins=False):
  encoder = Tokenizer(parts.WordLevel({word: i for i, word in enumerate(words)}, unk_token='[UNK]'))
  encoder.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  encoder.add_special_tokens([word for word in words if word[0] == '<'])
  if begins:
    encoder.post_processor = processors.TemplateProcessing(
      '<s> $A', special_tokens=[('<s>', ID['<s>'])]
    )
  return models.Tokenizer(
    encoder, eos=0, bos=ID['<s>'] if begins else None, pad=0, template=template
  )


def words(tokens):
  return ' '.join(WORDS[i] for i in tokens)


def talk(*contents):
  return {
    'messages': [
      {'role': role, 'content': text}
      for role, text in zip(('user', 'assistant') * 3, contents, strict=False)
    ]
  }


def marked(example, **options):
  """The words of an example, a * before those that are learnt."""
  tokens, learnt = encode(example, tokenizer(**options.pop('with_', {})), **options)
  return ' '.join('*' * bool(x) + WORDS[i] for i, x in zip(tokens, learnt, strict=True))


def test_the_completion_and_its_end_are_learnt():
  pair = {'prompt': 'a b', 'completion': 'c d'}
  assert marked(pair) == 'a b *c *d *<|end|>'
  assert marked(pair, with_={'begins': True}) == '<s> a b *c *d *<|end|>'
  assert marked(pair, chat=True) == '<|user|> a b <|end|> <|assistant|> *c *d *<|end|>'
  assert (
    marked(pair, chat=True, with_={'begins': True})[:8] == '<|user|>'
  )  # a template writes what begins a text


def test_every_answer_of_a_chat_is_learnt():
  assert marked(talk('a', 'b c', 'd', 'e')) == (
    '<|user|> a <|end|> <|assistant|> *b *c *<|end|> <|user|> d <|end|> <|assistant|> *e *<|end|>'
  )
  assert (
    marked(talk('a', 'b', 'c')) == '<|user|> a <|end|> <|assistant|> *b *<|end|>'
  )  # nobody answers c
  endless = TEMPLATE.replace(' {{ eos_token }}', '')
  assert (
    marked(talk('a', 'b'), with_={'template': endless}) == '<|user|> a <|assistant|> *b *<|end|>'
  )


def test_prompts_are_given_as_they_are_learnt_from():
  for example in ({'prompt': 'a b', 'completion': 'c d'}, talk('a', 'b', 'c', 'd e')):
    tokens, right = data.prompt(example, tokenizer())
    whole, learnt = encode(example, tokenizer())
    last = len(whole) - len(right.split()) - 1
    np.testing.assert_array_equal(tokens, whole[:last])
    assert learnt[last:].all() and words(whole[last:-1]) == right.strip()


@pytest.mark.parametrize(
  'example,change,message',
  (
    (talk('a', 'b'), {'template': None}, 'has no chat template'),
    (
      talk('a', 'b'),
      {'words': [w for w in WORDS if w != '<|user|>']},
      r"writes '<\|user\|>', which is no token of this",
    ),
    (
      talk('a', 'b', 'c', 'd'),
      {'template': '{{ messages | length }}' + TEMPLATE},
      'differently when it goes on',
    ),
    (
      talk('a', 'b'),
      {'template': "{{ raise_exception('no') }}"},
      'the chat template refuses the messages: no',
    ),
  ),
)
def test_tokenizers_that_cannot_write_a_chat_are_refused(example, change, message):
  with pytest.raises(ValueError, match=message):
    data.Packed([example], tokenizer(**change), 12)


PAIRS = (
  ('a', 'b c'),
  ('d e f g', 'h a b'),
  ('c', 'd'),
  ('e f', 'g h'),
  ('a b c d e f g h a b', 'c'),
  ('h', 'g f'),
)
EXAMPLES = [{'prompt': prompt, 'completion': completion} for prompt, completion in PAIRS]


def texts(rows):
  """(words of each text, in the order of rows), by the masks alone."""
  found = []
  for row in rows:
    numbers = row['token_mask']
    assert numbers.tolist() == [*sorted(numbers[numbers > 0]), *[0] * (numbers == 0).sum()]
    found.append([words(row['tokens'][numbers == n]) for n in range(1, numbers.max() + 1)])
  return found


def test_rows_hold_whole_texts_and_labels_are_the_next_tokens():
  packed = data.Packed(EXAMPLES, tokenizer(), 10)
  rows = [packed[i] for i in range(len(packed))]
  assert texts(rows) == [
    ['a b c <|end|>', 'c d <|end|>'],
    ['d e f g h a b <|end|>'],
    ['e f g h <|end|>', 'h g f <|end|>'],
  ]
  assert [row['index'] for row in rows] == [0, 1, 3]
  for row in rows:
    assert {name: x.dtype.name for name, x in row.items() if name != 'index'} == dict.fromkeys(
      ('tokens', 'token_mask', 'label'), 'int32'
    )
  np.testing.assert_array_equal(
    rows[0]['label'], [ID['b'], ID['c'], 0, IGNORED, ID['d'], 0, *[IGNORED] * 4]
  )
  np.testing.assert_array_equal(
    rows[1]['label'], [*[IGNORED] * 3, ID['h'], ID['a'], ID['b'], 0, *[IGNORED] * 3]
  )
  assert packed.about == (
    '5 texts in 3 rows of 10 tokens, 20% padding; 1 cut off, 1 left out: their completions '
    'begin later'
  )
  alone = data.Packed(EXAMPLES, tokenizer(), 12, pack=False)
  assert texts(alone[i] for i in range(6)) == [
    [f'{e["prompt"]} {e["completion"]} <|end|>'] for e in EXAMPLES
  ]


def test_a_long_completion_is_cut_off():
  packed = data.Packed([{'prompt': 'a', 'completion': 'b c d e'}], tokenizer(), 3)
  assert packed[0]['tokens'].tolist() == [ID['a'], ID['b'], ID['c']]
  assert packed[0]['label'].tolist() == [ID['b'], ID['c'], IGNORED]
  with pytest.raises(
    ValueError, match='of 1 texts none has a completion within its first 2 tokens; raise'
  ):
    data.Packed([{'prompt': 'a b', 'completion': 'c'}], tokenizer(), 2)


def test_rows_are_the_same_each_time_and_go_on_from_any_batch():
  rng = np.random.default_rng(0)
  examples = [
    {'prompt': 'a', 'completion': ' '.join(rng.choice(list('abcdefgh'), rng.integers(1, 9)))}
    for _ in range(200)
  ]
  whole = data.Packed(examples, tokenizer(), 24)
  assert sum(len(row) for row in texts(whole[i] for i in range(len(whole)))) == 200
  used = np.mean([(whole[i]['token_mask'] > 0).mean() for i in range(len(whole))])
  assert used > 0.93
  batches = lambda: data.Batches(data.Packed(examples, tokenizer(), 24), 4, seed=3)
  first = batches()
  for _ in range(5):
    next(first)
  again = batches()
  again.restore(first.state())
  one, other = next(first), next(again)
  assert one.keys() == other.keys()
  for name, x in one.items():
    np.testing.assert_array_equal(x, other[name])


# ---- What a template would leave out, and what is empty.

CALL = {'type': 'function', 'function': {'name': 'c', 'arguments': {'a': 'b'}}}
TOOLS = [{'type': 'function', 'function': {'name': 'c', 'parameters': {}}}]
CALLS = (
  '{% if tools %}<|user|> {% for t in tools %}{{ t.function.name }} {% endfor %}{{ eos_token }} '
  "{% endif %}{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|> "
  '{% for call in m.tool_calls %}{{ call.function.name }} '
  '{% for key, value in call.function.arguments.items() %}{{ key }} {{ value }} {% endfor %}'
  '{% endfor %}{{ m.content }} {{ eos_token }} {% endfor %}'
  '{% if add_generation_prompt %}<|assistant|> {% endif %}'
)
NAMED = "{% for m in messages %}{% if m.role == 'user' %}<|user|> {{ m.content }} {{ eos_token }} "
NAMED += "{% elif m.role == 'assistant' %}<|assistant|> {{ m.content }} {{ eos_token }} {% endif %}"
NAMED += '{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}'
RENAMED = TEMPLATE.replace("m['role']", "m['role'].replace('tool', 'user')")


def calling(**more):
  messages = [
    {'role': 'user', 'content': 'a'},
    {'role': 'assistant', 'content': '', 'tool_calls': [CALL]},
    {'role': 'tool', 'content': 'd'},
    {'role': 'assistant', 'content': 'e'},
  ]
  return {'messages': messages, **more}


def test_calls_of_tools_are_learnt():
  expected = '<|user|> a <|end|> <|assistant|> *c *a *b *<|end|> '
  expected += '<|user|> d <|end|> <|assistant|> *e *<|end|>'
  assert marked(calling(), with_={'template': CALLS}) == expected
  with_tools = marked(calling(tools=TOOLS), with_={'template': CALLS})
  assert with_tools == f'<|user|> c <|end|> {expected}'
  assert data.prompt(calling(tools=TOOLS), tokenizer(CALLS))[1].strip() == 'e'


@pytest.mark.parametrize(
  'example,template,message',
  (
    (calling(), RENAMED, "leaves out the tool_calls of message 1, of role 'assistant'"),
    (
      {'messages': [{'role': 'system', 'content': 'h'}, *talk('a', 'b')['messages']]},
      NAMED,
      "example 0: the chat template leaves out the content of message 0, of role 'system'",
    ),
    ({**talk('a', 'b'), 'tools': TOOLS}, NAMED, "leaves out the chat's tools"),
  ),
)
def test_what_a_template_would_leave_out_is_told(example, template, message):
  with pytest.raises(ValueError, match=message):
    data.Packed([example], tokenizer(template), 24)
  assert len(data.Packed([talk('a', 'b')], tokenizer(template), 24)) == 1


def test_contents_that_a_template_changes_are_written():
  quoted = TEMPLATE.replace("m['content']", "m['content'] | upper | tojson")
  marked(talk('a', 'b'), with_={'template': quoted})


def test_empty_completions_are_counted_and_alone_refused():
  empty = {'prompt': 'a', 'completion': ''}
  packed = data.Packed([empty, *EXAMPLES], tokenizer(), 12)
  assert packed.about.endswith('; 1 with an empty completion')
  for examples in ([empty] * 3, [talk('a', '')] * 3):
    with pytest.raises(ValueError, match='of 3 texts all completions are empty'):
      data.Packed(examples, tokenizer(), 12)


def test_a_token_without_a_row_is_named():
  small = dataclasses.replace(tokenizer(), vocabulary=ID['g'])
  data.Packed(EXAMPLES[2:3], small, 12)
  with pytest.raises(
    ValueError, match=r"example 1: 'd e f g' has the token 'g' with the number 11, and .* for 11 to"
  ):
    data.Packed([EXAMPLES[2], EXAMPLES[1]], small, 12)
  with pytest.raises(ValueError, match=r"its end or padding has the token 'h' with the number 12"):
    dataclasses.replace(small, pad=ID['h'])


# ---- Templates that say what the model writes.

BLOCKS = (
  "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|> {% generation %}"
  "{{ m['content'] }} {{ eos_token }}{% endgeneration %}\n"
  "{% else %}<|user|> {{ m['content'] }} {{ eos_token }}\n{% endif %}{% endfor %}"
  '{% if add_generation_prompt %}<|assistant|> {% endif %}'
)
WITHOUT_END = BLOCKS.replace(
  ' {{ eos_token }}{% endgeneration %}', '{% endgeneration %} {{ eos_token }}'
)
# A word of a thought comes first, which the model does not learn.
AFTER = BLOCKS.replace('{% generation %}', 'h {% generation %}')


def test_generation_blocks_say_what_is_learnt():
  chat = talk('a', 'b c', 'd', 'e')
  assert marked(chat, with_={'template': BLOCKS}) == marked(chat)
  assert marked(chat, with_={'template': WITHOUT_END}) == (
    '<|user|> a <|end|> <|assistant|> *b *c <|end|> <|user|> d <|end|> <|assistant|> *e'
  )
  assert marked(talk('a', 'b c'), with_={'template': AFTER}) == (
    '<|user|> a <|end|> <|assistant|> h *b *c *<|end|>'
  )
  # All that is in blocks, also what answers nothing.
  first = {'messages': [{'role': 'assistant', 'content': 'g'}, *chat['messages'][:2]]}
  assert marked(first, with_={'template': BLOCKS}).startswith('<|assistant|> *g *<|end|> <|user|>')
  tokens, right = data.prompt(talk('a', 'b c'), tokenizer(AFTER))
  assert (words(tokens), right) == ('<|user|> a <|end|> <|assistant|> h', 'b c ')


def test_an_end_that_is_not_learnt_is_told():
  packed = data.Packed([talk('a', 'b')] * 3, tokenizer(WITHOUT_END), 12)
  assert '3 of which no end is learnt, as it lies outside of the generation blocks' in packed.about
  assert 'no end' not in data.Packed([talk('a', 'b')], tokenizer(BLOCKS), 12).about


@pytest.mark.parametrize(
  ('template', 'message'),
  [
    (
      '{% generation %}' + BLOCKS + '{% endgeneration %}',
      'has a {% generation %} block in another',
    ),
    (TEMPLATE + '{% generation %}{% endgeneration %}', 'blocks of the chat template are empty'),
  ],
)
def test_generation_blocks_that_say_nothing_are_refused(template, message):
  with pytest.raises(ValueError, match=message):
    encode(talk('a', 'b'), tokenizer(template))
  with pytest.raises(ValueError, match=r'have a noncharacter, U\+FDD0'):
    encode(talk('a\ufdd0', 'b'), tokenizer(BLOCKS))


@pytest.mark.parity
@pytest.mark.parametrize('template', [BLOCKS, WITHOUT_END, AFTER])
def test_the_mask_is_that_of_transformers(template):
  transformers = pytest.importorskip('transformers')
  ours = tokenizer(template)
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_object=ours.encoder, eos_token='<|end|>', chat_template=template
  )
  messages = talk('a', 'b c', 'd', 'e f')['messages']
  found = theirs.apply_chat_template(
    messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
  )
  tokens, learnt = encode({'messages': messages}, ours)
  # Tokens behind the last one that is learnt are of no use.
  assert found['input_ids'][: len(tokens)] == tokens.tolist()
  mask = np.array(found['assistant_masks'], bool)
  np.testing.assert_array_equal(mask[: len(tokens)], learnt)
  assert not mask[len(tokens) :].any()
