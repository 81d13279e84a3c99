"""Makes tests/models/golden/smollm2.json: what transformers says of the packaged SmolLM2-135M.

Run with torch, transformers and gguf installed: python tests/models/make_smollm2.py (written with
transformers 5.23.0, torch 2.13.0 and gguf 0.19.0, whose own dequantization transformers uses).
"""

import json
from pathlib import Path

import gguf
import torch
import transformers

from jpeft.models.io import sources

PARAGRAPH = (
  'The lighthouse keeper climbed the stairs slowly that evening, counting each step as he had '
  'done for thirty years. Below him the harbor was filling with fishing boats that had turned '
  'back early, because the wind had shifted and the old men in the village did not like the '
  'color of the sky. He trimmed the wick, wiped the salt from the great glass lens, and lit the'
  ' lamp an hour before sunset. Somewhere beyond the reef a small sailboat was still out, and '
  'its owner, a schoolteacher who had learned to sail only last summer, was beginning to '
  'understand that the map in her hands was printed before the channel moved.'
)
PROMPT = 'The capital of France is'
TEXT = "In 1984, it's 3.50 kg\n\n  of Größe!"
MESSAGES = [{'role': 'user', 'content': 'Name 3 colors.'}]


def main():
  folder, _ = sources.find('smollm2-135m')
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, gguf_file='model.gguf', dtype=torch.float32
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file='model.gguf')
  encode = lambda text: tokenizer(text, return_tensors='pt').input_ids
  template = gguf.GGUFReader(folder / 'model.gguf').fields['tokenizer.chat_template'].contents()
  chat = tokenizer.apply_chat_template(
    MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=True
  )
  ids = encode(PARAGRAPH)
  with torch.no_grad():
    logits = model(ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    written = model.generate(encode(PROMPT), max_new_tokens=12, do_sample=False)[0]
  golden = {
    'paragraph': PARAGRAPH,
    'ids': ids[0].tolist(),
    'perplexity': round(float(loss.exp()), 4),
    'prompt': PROMPT,
    'completion': written.tolist()[encode(PROMPT).shape[1] :],
    'messages': MESSAGES,
    'chat': chat,
    'text': TEXT,
    'text_ids': tokenizer(TEXT).input_ids,
  }
  (Path(__file__).parent / 'golden' / 'smollm2.json').write_text(
    json.dumps(golden, indent=1) + '\n'
  )


if __name__ == '__main__':
  main()
