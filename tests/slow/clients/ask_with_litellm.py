"""What litellm gets, as JSON; see test_clients.py."""

import json
import sys

import litellm

asked = json.loads(sys.argv[1])
server = {"api_base": asked["url"], "api_key": "none", "num_retries": 0}
settings = server | {"temperature": 0, "max_tokens": asked["max_tokens"]}
chat = {"model": f"openai/{asked['model']}"}
chat["messages"] = [{"role": "user", "content": asked["text"]}]
completion = litellm.text_completion(
    model=f"text-completion-openai/{asked['model']}", prompt=asked["text"], **settings
)
embeddings = litellm.embedding(model=f"openai/{asked['model']}", input=asked["texts"], **server)
stream = litellm.completion(stream=True, **chat, **settings)
got = {
    "models": litellm.get_valid_models(
        check_provider_endpoint=True,
        custom_llm_provider="openai",
        api_base=asked["url"].removesuffix("/v1"),
        api_key="none",
    ),
    "completion": completion.choices[0].text,
    "chat": litellm.completion(**chat, **settings).choices[0].message.content,
    "stream": [chunk.choices[0].delta.content or "" for chunk in stream],
    "embeddings": [each["embedding"] for each in embeddings.data],
}
print(json.dumps(got))
