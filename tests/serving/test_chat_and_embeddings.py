"""The official client's chats are completions of rendered prompts; its embeddings are the model's
hidden states."""

import base64
import concurrent.futures
import json
import time

import httpx2
import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from served import ASKED, NAME, error_of, list_of, post, running, wait_idle

import glm_jax
from glm_jax.engine.embedding import mean_hidden
from glm_jax.model import glm
from glm_jax.serving.chat_template import ChatTemplate, ChatTemplateError

pytest_plugins = ["serving_fixtures"]

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "The capital of France?"},
    {"role": "assistant", "content": "Paris.", "refusal": None, "tool_calls": None},
    {
        "role": "user",
        "content": [{"type": "text", "text": "Of"}, {"type": "text", "text": "日本?"}],
    },
]
PROMPT = "Be brief.\n\nUser: The capital of France?\nAssistant: Paris.\nUser: Of\n日本?\nAssistant:"
TEMPLATE = "configs/chat/dialogue.jinja"


@pytest.fixture(scope="module")
def served(model):
    with running(lambda: model, chat_template=ChatTemplate.read(TEMPLATE)) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def _chat(client, **fields):
    ours = {k: fields.pop(k) for k in ("top_k", "min_tokens", "unidirectional") if k in fields}
    asked = {"messages": MESSAGES, "model": NAME, "extra_body": ours}
    return client.chat.completions.create(**asked | fields)


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=0),
        dict(seed=3, n=3, top_k=50, stop=["e", "の"]),
        dict(seed=4, presence_penalty=1.5, frequency_penalty=-1.0, logit_bias={"77": 9, "78": 8}),
        dict(seed=5, top_p=0.9, min_tokens=3, unidirectional=True),
    ],
)
def test_a_chat_is_the_completion_of_the_rendered_prompt(client, settings):
    ours = {k: settings[k] for k in ("top_k", "min_tokens", "unidirectional") if k in settings}
    openais = {k: v for k, v in settings.items() if k not in ours}
    expected = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=9, logprobs=2, extra_body=ours, **openais
    )
    asked = dict(max_tokens=9, logprobs=True, top_logprobs=2, **settings)
    got = _chat(client, **asked)
    assert got.object == "chat.completion"
    assert got.usage == expected.usage
    deltas = {}
    options = {"include_usage": True}
    for chunk in _chat(client, **asked, stream=True, stream_options=options):
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            deltas.setdefault(choice.index, []).append(choice)
    assert chunk.usage == expected.usage
    for choice, completed in zip(got.choices, expected.choices, strict=True):
        assert choice.index == completed.index
        assert choice.message.role == "assistant"
        assert choice.message.content == completed.text
        assert choice.finish_reason == completed.finish_reason
        named = choice.logprobs.content
        assert [token.token for token in named] == completed.logprobs.tokens
        values = [token.logprob for token in named]
        assert values == pytest.approx(completed.logprobs.token_logprobs, 1e-5)
        for token, top in zip(named, completed.logprobs.top_logprobs, strict=True):
            assert [t.token for t in token.top_logprobs] == list(top)[:2]
            assert token.token == "" or bytes(token.bytes).decode() == token.token
        first, *others, last = deltas[choice.index]
        assert (first.delta.role, first.delta.content) == ("assistant", "")
        assert "".join(part.delta.content for part in others) == choice.message.content
        assert [t.token for part in others for t in part.logprobs.content] == [
            t.token for t in named
        ]
        assert last.finish_reason == choice.finish_reason
        assert last.delta.content is last.delta.role is None
        assert all(part.finish_reason is None for part in (first, *others))


def test_a_chat_goes_on_with_its_answer(client):
    """As clients do: the answer is sent back as it came, as an object or as JSON."""
    answer = _chat(client, max_completion_tokens=5, seed=1).choices[0].message
    for sent in (answer, answer.model_dump()):
        again = [*MESSAGES, sent, {"role": "user", "content": "And?"}]
        got = _chat(client, messages=again, max_completion_tokens=3)
        assert got.usage.completion_tokens == 3
    assert got.usage.prompt_tokens > 10


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_chats_answer_has_the_format_that_is_asked_for(client, is_streamed):
    schema = {"enum": ["yes", "no", 7]}
    asked = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    got = _chat(client, response_format=asked, seed=1, max_tokens=30, stream=is_streamed)
    parts = [part.choices[0].delta for part in got] if is_streamed else [got.choices[0].message]
    assert json.loads("".join(part.content or "" for part in parts)) in schema["enum"]


def test_a_chat_without_max_tokens_goes_on_as_long_as_there_is_room(client, model):
    [choice] = (whole := _chat(client, seed=1, logit_bias={"77": 100})).choices
    assert choice.finish_reason == "length"
    assert whole.usage.total_tokens == model.engine.max_length - 1  # and sop


def test_a_server_without_a_template_says_how_to_give_one(model):
    with running(lambda: model) as without:
        asked = {"model": NAME, "messages": MESSAGES}
        error = error_of(post(without, "/v1/chat/completions", json=asked), 400)
        assert "--chat_template=FILE, such as configs/chat/dialogue.jinja" in error["message"]
        other = post(without, "/v1/chat/completions", json=asked | {"model": "gpt"})
        error_of(other, 404)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hi"}, "messages", "valid array"),
        ({"messages": ["Hi"]}, "messages", "messages: Input should be an object, at messages[0]"),
        (
            {"messages": [{"role": "user"}]},
            "messages",
            "messages: Field required, at messages[0].content",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "valid string"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "'assistant'"),
        ({"messages": [{"role": "user", "content": []}]}, "messages", "at least 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages",
            "type 'image_url': only text is read, at messages[0].content",
        ),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages", "required"),
        ({"messages": [{"role": "user", "content": "a", "b": 1}]}, "messages", "Extra inputs"),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
            "messages",
            "messages: Input should be null, at messages[0].tool_calls",
        ),
        ({"tools": []}, "tools", "Extra inputs are not permitted"),
        ({"prompt": "a"}, "prompt", "Extra inputs are not permitted"),
        ({"echo": True}, "echo", "Extra inputs are not permitted"),
        ({"logprobs": 2}, "logprobs", "valid boolean"),
        ({"top_logprobs": 2}, "top_logprobs", "without logprobs"),
        ({"logprobs": True, "top_logprobs": 6}, "top_logprobs", "less than or equal to 5"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", "leave out one"),
        ({"n": 1000}, "n", "less than or equal to 128"),
        ({"n": 128, "messages": MESSAGES * 60}, None, "no room for an answer in 128"),
        ({"stream": True, "num_beams": 2}, "stream", "leave out one"),
        ({"messages": [{"role": "user", "content": "[MASK] [MASK]"}]}, "messages", "2 blanks"),
    ],
)
def test_chats_that_cannot_be_answered(served, fields, param, message):
    asked = {"model": NAME, "messages": MESSAGES} | fields
    error = error_of(post(served, "/v1/chat/completions", json=asked), 400)
    assert message in error["message"]
    assert len(error["message"]) < 300
    assert error["param"] == param


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "refuses the messages: roles must alt"),
        ("{{ messages[0].content.no.such }}", "fails on these messages: 'str object' has no"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_fails_on_messages_is_one_line(source, message):
    template = ChatTemplate(source)
    with pytest.raises(ChatTemplateError) as caught:
        template.render(MESSAGES)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_templates_have_what_transformers_gives_them():
    source = (
        "{% for m in messages %}\n  {% generation %}{{ m.content | tojson }}{% endgeneration %}\n"
        "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}"
        "{{ bos_token + eos_token }}{{ tools is none }}{{ strftime_now('%d') | length }}"
    )
    messages = [{"role": "user", "content": "<é>"}] * 3
    rendered = ChatTemplate(source).render(messages, bos_token="", eos_token="<eop>")
    assert rendered == '"<é>""<é>"<eop>True2'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{% for m in messages %}\n{% endif %}", r":2: Encountered unknown tag 'endif'"),
        (b"\n\n{{ messages | no_such }}", r":3: No filter named 'no_such'"),
        (b"{{ " + b"(" * 10_000, r"nested too deeply"),
        (b"{% for a in b %}" * 30 + b"{% endfor %}" * 30, r"nested too deeply"),
        (b"\xff\xff", r":1: not UTF-8 at byte 1"),
        (None, r": No such file"),
    ],
)
def test_a_file_that_is_no_template_is_one_line(tmp_path, content, message):
    file = tmp_path / "chat.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(
        ChatTemplateError, match=f"--chat_template={file}(: )?({message})"
    ) as caught:
        ChatTemplate.read(str(file))
    assert "\n" not in str(caught.value)


TEXTS = ["The capital of France is Paris.", "日本", "a", "The capital " * 24]


def _direct(model, tokens):
    """By the model itself: the text and [gMASK], each of which sees all."""
    context = jnp.array([[*tokens, model.tokenizer.special_tokens.gmask]])
    length = context.shape[1]
    arguments = context, jnp.arange(length)[None], jnp.ones((1, length, length), bool)
    hidden, _ = jax.jit(glm.forward_hidden, static_argnums=1)(
        model.params, model.config, *arguments
    )
    logits = glm_jax.forward(model.params, model.config, *arguments)
    scores = hidden[0] @ model.params.embedding.take_rows(jnp.arange(model.config.vocab_size)).T
    np.testing.assert_allclose(scores, logits[0], atol=1e-3)  # the ones that logits are made of
    return np.asarray(hidden[0, :-1], np.float64).mean(axis=0)


def test_embeddings_are_the_models(client, model, served):
    tokens = [model.tokenizer.encode(text) for text in TEXTS]
    assert max(map(len, tokens)) > 64
    got = client.embeddings.create(model=NAME, input=TEXTS, encoding_format="float")
    assert [each.index for each in got.data] == [0, 1, 2, 3]
    assert got.usage.prompt_tokens == got.usage.total_tokens == sum(map(len, tokens))
    together = np.array([each.embedding for each in got.data])
    assert together.shape == (4, model.config.hidden_size)
    np.testing.assert_allclose(together[1], _direct(model, tokens[1]), atol=1e-5)
    compiled = mean_hidden._cache_size()
    for form in (TEXTS, tokens):  # by default the client asks for base64
        again = client.embeddings.create(model=NAME, input=form)
        np.testing.assert_allclose([e.embedding for e in again.data], together, atol=1e-6)
    for number in range(4):
        for form in (TEXTS[number], tokens[number]):
            [alone] = client.embeddings.create(model=NAME, input=form).data
            np.testing.assert_allclose(alone.embedding, together[number], atol=1e-5)
    many = client.embeddings.create(model=NAME, input=TEXTS * 60, encoding_format="base64")
    values = [np.frombuffer(base64.b64decode(each.embedding), "<f4") for each in many.data]
    np.testing.assert_allclose(values, np.tile(together, (60, 1)), atol=1e-5)
    assert mean_hidden._cache_size() == compiled  # one shape for all of them
    wait_idle(served)


@pytest.mark.parametrize("slow_steps", [0.02], indirect=True)
def test_texts_are_embedded_beside_requests(served, model, slow_steps):
    asked = {"model": NAME, "input": TEXTS * 20}  # several batches
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        generating = pool.submit(post, served, json=ASKED | {"max_tokens": 90})
        while not model.engine.running:
            time.sleep(0.001)
        embedded = post(served, "/v1/embeddings", json=asked)
        assert len(embedded.json()["data"]) == len(asked["input"])
        assert not generating.done()
        assert generating.result().status_code == 200
    wait_idle(served)


def test_masks_in_an_embedded_text_are_text(client, model):
    text = "a [MASK] <eop> b"
    [got] = client.embeddings.create(model=NAME, input=text).data
    [of_tokens] = client.embeddings.create(model=NAME, input=model.tokenizer.encode(text, ())).data
    np.testing.assert_allclose(got.embedding, of_tokens.embedding, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": ""}, "input", "input[0]: no tokens"),
        ({"input": ["a", ""]}, "input", "input[1]: no tokens"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [[]]}, "input", "at least 1"),
        ({"input": ["a", [1]]}, "input", "valid"),
        ({"input": None}, "input", "valid"),
        ({"input": ["a"] * 2049}, "input", "at most 2048"),
        ({"input": "word " * 500}, "input", "tokens: at most 127"),
        ({"input": "a" * 100_000}, "input", "100000 characters: at most 127 tokens"),
        ({"input": [4096]}, "input", "token 4096 is not in the vocabulary"),
        ({"input": [-1]}, "input", "greater than or equal to 0"),
        ({"dimensions": 8}, "dimensions", "are not made to be cut"),
        ({"dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"stream": True}, "stream", "Extra inputs are not permitted"),
    ],
)
def test_embeddings_that_cannot_be_made(served, fields, param, message):
    asked = {"model": NAME, "input": "a"} | fields
    error = error_of(post(served, "/v1/embeddings", json=asked), 400)
    assert message in error["message"]
    assert len(error["message"]) < 300
    assert error["param"] == param


def test_an_answer_has_so_many_numbers(served, model, monkeypatch):
    size = model.config.hidden_size
    monkeypatch.setattr("glm_jax.serving.embeddings._MAX_NUMBERS", 3 * size - 1)
    asked = {"model": NAME, "input": ["a"] * 3}
    error = error_of(post(served, "/v1/embeddings", json=asked), 400)
    assert error["message"] == "3 texts: at most 2 in one request"
    asked = {"model": NAME, "input": ["a"] * 2, "dimensions": size}
    assert post(served, "/v1/embeddings", json=asked).status_code == 200


def test_hidden_states_that_are_no_numbers_are_the_servers_fault(served, model, monkeypatch):
    def broken(*args):
        return np.full((1, 64, model.config.hidden_size), np.nan, np.float32)

    monkeypatch.setattr("glm_jax.engine.embedding.mean_hidden", broken)
    error = error_of(post(served, "/v1/embeddings", json={"model": NAME, "input": "a"}), 500)
    assert "hidden states are not finite" in error["message"]


def test_large_bodies_are_refused_shortly(served):
    headers = {"Content-Type": "application/json"}
    for path, field, value in (
        ("chat/completions", "messages", list_of('{"role":"user","content":""}', 300_000)),
        ("embeddings", "input", list_of("1", 100_000)),
    ):
        content = f'{{"model": "{NAME}", "{field}": {value}}}'.encode()
        refused = post(served, f"/v1/{path}", json=None, content=content, headers=headers)
        assert len(error_of(refused, 400)["message"]) < 300, path


def test_the_schema_has_both(served):
    paths = httpx2.get(served.url + "/openapi.json").json()["paths"]
    for path in ("/v1/chat/completions", "/v1/embeddings"):
        assert "application/json" in json.dumps(paths[path]["post"]["requestBody"])
