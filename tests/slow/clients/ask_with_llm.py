"""What `llm` gets, as JSON; see test_clients.py."""

import json
import os
import sys
from pathlib import Path

asked = json.loads(sys.argv[1])
os.environ["OPENAI_BASE_URL"] = asked["url"]  # of embeddings, which its file of models cannot name

import llm
from llm.default_plugins.openai_models import OpenAIEmbeddingModel

models = [
    {
        "model_id": kind,
        "model_name": asked["model"],
        "api_base": asked["url"],
        "completion": is_text,
    }
    for kind, is_text in (("chat", False), ("completion", True))
]
Path(os.environ["LLM_USER_PATH"], "extra-openai-models.yaml").write_text(json.dumps(models))
settings = {"temperature": 0, "max_tokens": asked["max_tokens"]}
chat, completion = llm.get_model("chat"), llm.get_model("completion")
embedding = OpenAIEmbeddingModel(asked["model"], asked["model"])
got = {
    "completion": completion.prompt(asked["text"], stream=False, **settings).text(),
    "chat": chat.prompt(asked["text"], stream=False, **settings).text(),
    "stream": list(chat.prompt(asked["text"], stream=True, **settings)),
    "embeddings": list(embedding.embed_multi(asked["texts"])),
}
print(json.dumps(got))
