"""What the official client gets, as JSON; see test_clients.py."""

import json
import sys

import openai

asked = json.loads(sys.argv[1])
client = openai.OpenAI(base_url=asked["url"], api_key="none", max_retries=0)
settings = {"model": asked["model"], "temperature": 0, "max_tokens": asked["max_tokens"]}
messages = [{"role": "user", "content": asked["text"]}]
stream = client.chat.completions.create(messages=messages, stream=True, **settings)
embeddings = client.embeddings.create(model=asked["model"], input=asked["texts"])
got = {
    "models": [model.id for model in client.models.list()],
    "completion": client.completions.create(prompt=asked["text"], **settings).choices[0].text,
    "chat": client.chat.completions.create(messages=messages, **settings)
    .choices[0]
    .message.content,
    "stream": [chunk.choices[0].delta.content or "" for chunk in stream],
    "embeddings": [each.embedding for each in embeddings.data],
}
print(json.dumps(got))
