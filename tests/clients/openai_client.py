"""Drives a running worker with the official OpenAI client. usage: openai_client.py PORT"""

import sys

from openai import APIStatusError, OpenAI

MODEL = "smollm2"
client = OpenAI(base_url=f"http://127.0.0.1:{sys.argv[1]}/v1", api_key="none", max_retries=0, timeout=60)

assert MODEL in [model.id for model in client.models.list()]

messages = [{"role": "user", "content": "Name a fruit."}]
whole = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=24, logprobs=True, top_logprobs=2)
text = whole.choices[0].message.content
assert text and whole.choices[0].finish_reason in ("stop", "length")
assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.content)
assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2

pieces, reasons, usage = [], [], None
stream = client.chat.completions.create(
    model=MODEL, messages=messages, temperature=0, max_tokens=24, stream=True, stream_options={"include_usage": True}
)
for chunk in stream:
    usage = chunk.usage or usage
    for choice in chunk.choices:
        pieces.append(choice.delta.content or "")
        reasons += [choice.finish_reason] if choice.finish_reason else []
assert "".join(pieces) == text, (pieces, text)
assert reasons == [whole.choices[0].finish_reason]
assert usage.completion_tokens == whole.usage.completion_tokens

sampled = [
    client.completions.create(model=MODEL, prompt="Once upon a time", n=3, seed=7, temperature=0.8, max_tokens=12)
    for _ in range(2)
]
texts = [[choice.text for choice in answer.choices] for answer in sampled]
assert texts[0] == texts[1] and len(set(texts[0])) > 1, texts

try:
    client.chat.completions.create(model=MODEL, messages=messages, temperature=-1)
    raise SystemExit("a temperature of -1 was accepted")
except APIStatusError as error:
    assert error.status_code == 400 and error.body["param"] == "temperature", error.body

print("openai client: ok")
