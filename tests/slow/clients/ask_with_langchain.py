"""What langchain gets, as JSON; see test_clients.py."""

import json
import sys

from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

asked = json.loads(sys.argv[1])
server = {"base_url": asked["url"], "api_key": "none", "model": asked["model"], "max_retries": 0}
settings = server | {"temperature": 0, "max_tokens": asked["max_tokens"]}
chat = ChatOpenAI(**settings)
# By default it counts, and sends, tokens of OpenAI's models.
embeddings = OpenAIEmbeddings(check_embedding_ctx_length=False, **server)
got = {
    "completion": OpenAI(**settings).invoke(asked["text"]),
    "chat": chat.invoke([("human", asked["text"])]).content,
    "stream": [chunk.content for chunk in chat.stream([("human", asked["text"])])],
    "embeddings": embeddings.embed_documents(asked["texts"]),
}
print(json.dumps(got))
