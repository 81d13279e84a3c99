"""Makes tests/models/golden/gguf_tokenizers.json: small vocabularies of GGUF, and the ids that the
tokenizers which transformers builds of them give tricky texts.

Run with transformers 4 installed, which reads tokenizers of GGUF: python
tests/models/make_gguf_tokenizers.py (written with transformers 4.57.6 and tokenizers 0.22.2). Its
reader of Llama 3 splits as GPT-2, so that one is made by its converter of tiktoken files.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.ggml import (
  GGUFGPTConverter,
  GGUFLlamaConverter,
  GGUFQwen2Converter,
)

GOLDEN = Path(__file__).parent / 'golden'
TEXTS = (
  'Hello, world! The the THE theatre.',
  "I'm sure they'LL say it'S don't, we've, he'd; 'tis 'em",
  '0 12 123 1234 12345 3.14 1,000,000 ²³ ٣٤ Ⅷ',
  '  two  spaces   three\ttab \t mixed ',
  'line\nline\n\n\nlines \n \r\n end\n',
  'naïve café cafe\u0301 Ångström ﬁnance İstanbul ß',
  '你好，世界。今天是2024年。こんにちは 안녕하세요',
  '😀👩‍👩‍👧 emoji🏳️‍🌈 ☃',
  'camelCase HTTPServer snake_case x=y+1; // a/b\n/* c */',
  'المملكة العربية हिन्दी ไทย ελληνικά кириллица',
  '<|im_start|>user\nthe<|im_end|>\n',
  'nul\x00 zero\u200bwidth nbsp\u00a0x \u3000y',
  '',
  ' ',
  '\n',
)
SAMPLE = (
  'the theatre and the world say hello, they are sure of the line lines and two spaces. '
  "Hello world, it's the end; don't say 123 1234 2024. camelCase snake_case café naïve 你好 世界 "
) * 3
SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')


def trained(pre_tokenizer, alphabet, size):
  """(tokens in their order, merges as texts) of byte pairs trained on the sample."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizer
  trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
  tokenizer.train_from_iterator([SAMPLE], trainer)
  model = json.loads(tokenizer.to_str())['model']
  tokens = sorted(model['vocab'], key=model['vocab'].get)
  return tokens, [' '.join(merge) for merge in model['merges']]


def encoded(tokenizer, texts=TEXTS):
  ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
  return {'ids': ids, 'texts': [tokenizer.decode(one, skip_special_tokens=True) for one in ids]}


def by_merges():
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  # Split at spaces alone, so that some merges reach across what a model splits.
  sequence = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(r' ?\S+'), 'isolated'), pre_tokenizers.ByteLevel(False, False)]
  )
  tokens, merges = trained(sequence, alphabet, 360)
  # Tokens that no merge makes, which Llama 3 and Tekken find whole.
  whole = ['Ġtheatre', 'caf', '123']
  tokens = [*tokens, *(token for token in whole if token not in tokens), *SPECIAL]
  types = [1] * (len(tokens) - 3) + [3] * 3
  told = {'tokens': tokens, 'merges': merges, 'token_type': types, 'eos_token_id': len(tokens) - 1}

  def special(tokenizer):
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer

  def as_tiktoken(pattern):
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [tuple(merge.split(' ')) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(Regex(pattern), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
      ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return special(tokenizer)

  # That of tokenizer.json of Mistral Nemo, which transformers puts in place of a wrong one.
  tekken = (
    r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+'
    r'|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*'
    r'|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
  )
  return {
    'told': told,
    'gpt-2': encoded(special(GGUFGPTConverter(dict(told)).converted())),
    'qwen2': encoded(GGUFQwen2Converter(dict(told)).converted()),
    'llama-bpe': encoded(as_tiktoken(TikTokenConverter().pattern)),
    'tekken': encoded(as_tiktoken(tekken)),
  }


def by_scores():
  pieces, _ = trained(pre_tokenizers.Metaspace('▁', 'always'), [], 200)
  long = [piece for piece in pieces if len(piece) > 1]
  short = [piece for piece in pieces if len(piece) == 1]
  tokens = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256)), *long, *short]
  types = [2, 3, 3] + [6] * 256 + [1] * (len(long) + len(short))
  scores = [0.0] * 259 + [-float(i) for i in range(len(long) + len(short))]
  told = {
    'tokens': tokens,
    'scores': scores,
    'token_type': types,
    'unknown_token_id': 0,
    'bos_token_id': 1,
    'eos_token_id': 2,
  }
  texts = (*TEXTS, '<s>the world</s> hello <s> 你')
  made = encoded(GGUFLlamaConverter(dict(told)).converted(), texts)
  return {'told': told, 'inputs': texts, 'llama': made}


def main():
  golden = {'inputs': TEXTS, 'merges': by_merges(), 'scores': by_scores()}
  text = json.dumps(golden, ensure_ascii=False)
  (GOLDEN / 'gguf_tokenizers.json').write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__':
  main()
