"""Decoding writes what the original writes."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from jax.sharding import NamedSharding, PartitionSpec
from stub_tokenizer import WordTokenizer

from glm_jax.engine.prompt import Prompt, PromptError, bucket
from glm_jax.engine.sampling import Sampling, filter_logits, greedy, sample
from glm_jax.generation.blank_filling import fill_blanks
from glm_jax.generation.generate import generate
from glm_jax.generation.terminal import Strategy, fill_all
from glm_jax.kernels.quantized_matmul.cpu import TiledArray
from glm_jax.model import glm
from glm_jax.model import params as glm_params
from glm_jax.model.device_layout import PrecisionError, prepare
from glm_jax.model.visibility import Visibility
from glm_jax.quantization import Scheme
from glm_jax.sharding import make_mesh

DECODE = json.loads((GOLDEN / "decode.json").read_text())["cases"]
FILL = [c for c in json.loads((GOLDEN / "fill_blanks.json").read_text()) if c["kind"] == "greedy"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", DECODE, ids=range(len(DECODE)))
def test_greedy_equals_the_original(golden_float32, case):
    config, params = golden_float32
    prompt = case["prompt"]
    position = None if prompt["gmask"] else prompt["mask_position"]
    [output] = generate(
        params,
        config,
        [Prompt(tuple(prompt["context"]), position)],
        max_length=prompt["max_length"],
        end_tokens=prompt["end_tokens"],
    )
    assert [*prompt["context"], config.special_tokens.sop, *output] == case["greedy"]


@pytest.mark.slow  # test_engine.py has it for its own requests
def test_rows_of_one_batch_do_not_touch_each_other(golden_float32):
    config, params = golden_float32
    outputs = generate(params, config, [c["prompt"]["context"] for c in DECODE], max_length=31)
    for output, case in zip(outputs, DECODE, strict=True):
        assert [*case["prompt"]["context"], 504, *output] == case["greedy"][:31]


@pytest.mark.gpu
@pytest.mark.parametrize("case", FILL, ids=[c["text"] for c in FILL])
def test_filling_equals_the_original(golden_float32, golden_special, case):
    config, params = golden_float32
    filled = fill_blanks(
        params,
        config,
        WordTokenizer(golden_special),
        case["text"],
        max_length=case["out_seq_length"],
        end_tokens=case["end_tokens"],
    )
    assert filled.text == case["answers"][0]
    assert list(filled.blanks) == case["blanks"][0]
    assert "".join(text for text, _ in filled.pieces) == filled.text


def test_a_text_too_long_is_an_error_of_its_own_and_the_others_are_answered(
    golden_float32, golden_special, capsys
):
    config, params = golden_float32
    texts = ["t3 [MASK]", " ".join(["t5"] * 30), "t12 t13"]
    tokenizer = WordTokenizer(golden_special)
    assert fill_all(params, config, tokenizer, texts, Strategy(Sampling(), 12)) == 1
    printed = capsys.readouterr()
    first, second = printed.out.splitlines()
    assert first.startswith("t3 t269")
    assert second.startswith("t12 t13 ")
    assert printed.err.startswith("error: line 2: the text has 31 tokens")


def test_several_blanks_are_filled_from_left_to_right(golden_float32, golden_special):
    """Each blank is what `generate` puts into the text as it stands by then."""
    config, params = golden_float32
    tokenizer = WordTokenizer(golden_special)
    ends = [*golden_special.end_tokens, 261, 133]
    filled = fill_blanks(
        params, config, tokenizer, "t5 t9 [MASK] t33 [MASK] t7", max_length=40, end_tokens=ends
    )
    tokens = [5, 9, 500, 33, 500, 7, golden_special.eos]
    for blank in filled.blanks:
        [output] = generate(params, config, [tokens], max_length=40, end_tokens=ends)
        kept = output[:-1] if output[-1] in ends else output
        assert tokenizer.decode(kept) == blank
        position = tokens.index(500)
        tokens[position : position + 1] = kept
    assert len(filled.blanks) == 2
    assert filled.text == tokenizer.decode(tokens[:-1])


def test_end_tokens_end_a_row_and_nothing_else(golden_float32):
    config, params = golden_float32
    context, free = DECODE[0]["prompt"]["context"], DECODE[0]["greedy"][16:]
    first = free.index(427)
    ended, other = generate(
        params, config, [context, DECODE[3]["prompt"]["context"]], max_length=37, end_tokens=[427]
    )
    assert ended == free[: first + 1]
    assert [*DECODE[3]["prompt"]["context"], 504, *other] == DECODE[3]["greedy"]


def test_on_tokens_sees_every_token(golden_float32):
    config, params = golden_float32
    seen = []
    prompts = [c["prompt"]["context"] for c in DECODE[:2]]
    outputs = generate(params, config, prompts, max_length=20, on_tokens=seen.append)
    columns = np.stack(seen).T.tolist()
    assert [[t for t in column if t >= 0] for column in columns] == outputs


def test_the_filter_equals_the_original():
    with np.load(GOLDEN / "sampling.npz") as golden:
        logits = jnp.asarray(golden["logits"])
        names = [name for name in golden.files if name != "logits"]
        assert len(names) == 16
        for name in names:
            top_k, top_p = re.fullmatch(r"kept_k(\d+)_p([\d.]+)", name).groups()
            rows = len(logits)
            filtered = jax.jit(filter_logits)(
                logits, jnp.full(rows, int(top_k)), jnp.full(rows, float(top_p))
            )
            np.testing.assert_array_equal(np.isfinite(filtered), golden[name], err_msg=name)


def test_the_filter_keeps_what_a_sort_would_keep():
    """With many equal logits, and settings of every row its own."""
    rng = np.random.default_rng(0)
    logits = np.round(rng.normal(0, 2, (200, 300)), 1).astype(np.float32)
    logits[::7, ::2] = -0.0
    top_k, top_p = rng.integers(0, 40, 200), rng.choice([0, 0.05, 0.5, 0.93, 1], 200)
    kept = np.isfinite(filter_logits(jnp.asarray(logits), jnp.asarray(top_k), jnp.asarray(top_p)))
    for row, k, p, got in zip(logits.astype(np.float64), top_k, top_p, kept, strict=True):
        order = np.argsort(-row, kind="stable")
        allowed = row >= row[order[k - 1]] if k else np.ones(300, bool)
        if 0 < p < 1:
            weights = np.where(allowed, np.exp(row), 0)[order]
            before = (np.cumsum(weights) - weights) / weights.sum()
            allowed[order[before > p]] = False
        np.testing.assert_array_equal(got, allowed)


@pytest.mark.parametrize("vocab", [5, 64, 1000])
def test_greedy_is_the_first_of_the_likeliest(vocab):
    logits = np.random.default_rng(0).integers(0, 9, (50, vocab)).astype(np.float32)
    np.testing.assert_array_equal(greedy(jnp.asarray(logits)), np.argmax(logits, axis=1))


def test_samples_follow_the_tempered_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    rows = 20_000
    keys = jax.random.split(jax.random.key(0), rows)
    settings = Sampling(0.5, top_k=3).row()
    each = jax.tree.map(lambda x: jnp.full(rows, x), settings)
    drawn = sample(jnp.broadcast_to(logits, (rows, 4)), keys, each)
    expected = np.array([0.25, 0.09, 0.0225, 0.0])
    frequency = np.bincount(drawn, minlength=4) / rows
    np.testing.assert_allclose(frequency, expected / expected.sum(), atol=0.015)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Sampling(1.0, min_p=0.2), {0, 1, 2}),  # 0.15 is at least a fifth of 0.5, 0.05 is not
        (Sampling(0.5, min_p=0.2), {0, 1}),  # of what temperature leaves
        (Sampling(1.0, min_p=0.05), {0, 1, 2, 3}),
        (Sampling(1.0, min_p=1.0), {0}),
        (Sampling(1.0, top_k=2, min_p=0.2), {0, 1}),
        (Sampling(1.0, top_p=0.4, min_p=0.2), {0}),
    ],
)
def test_min_p_is_relative_to_the_most_likely_token(settings, expected):
    rows = 2000
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])) + 7, (rows, 4))
    each = jax.tree.map(lambda x: jnp.full(rows, x), settings.row())
    drawn = sample(logits, jax.random.split(jax.random.key(0), rows), each)
    assert set(np.asarray(drawn).tolist()) == expected


def test_sampling_depends_on_the_seed_alone(tiny_model):
    config, params = tiny_model
    settings = Sampling(temperature=1.0, top_k=50, top_p=0.9)
    runs = [
        generate(params, config, [[5, 241], [6, 241]], max_length=24, sampling=settings, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_bucket():
    assert [bucket(n) for n in (1, 32, 33, 64, 65, 2048)] == [32, 32, 64, 64, 128, 2048]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([[1] * 63], {}, "past 64"),
        ([[1, 999]], {}, "token 999 is not in the vocabulary"),
        ([[1]], {"max_length": 65}, "past the model's 64 positions"),
    ],
)
def test_impossible_prompts_are_refused(tiny_model, prompts, options, message):
    config, params = tiny_model
    with pytest.raises(PromptError, match=message):
        generate(params, config, prompts, **options)


def test_unknown_special_tokens_are_refused(tiny_model):
    config, params = tiny_model
    with pytest.raises(PromptError, match="special tokens are not known"):
        generate(params, config.replace(special_tokens=None), [[1]])


def test_embedding_and_activations_in_few_bits_change_scores_a_little(tiny_model):
    config, params = tiny_model
    params = glm_params.quantize_params(params, Scheme(8))
    tokens = jax.random.randint(jax.random.key(3), (1, 24), 0, 200)
    mask = Visibility.prefix(jnp.array([5]), 24)
    score = lambda p: glm.forward(p, config, tokens, tokens * 0, mask)
    exact = score(params)
    most = {8: 2e-2, 4: 0.2}
    for bits in ({}, {"embedding_bits": 8}, {"embedding_bits": 4}, {"activation_bits": 8}):
        prepared = prepare(params, **bits)
        assert isinstance(prepared.word_embeddings.kernel, TiledArray)
        assert prepared.word_embeddings.kernel.bits == bits.get("embedding_bits", 32)
        error = float(jnp.linalg.norm(score(prepared) - exact) / jnp.linalg.norm(exact))
        assert 1e-4 < error < most[min(bits.values())] if bits else error < 1e-5


def test_bits_that_are_not_to_be_had_are_refused(tiny_model):
    _, params = tiny_model
    everywhere = NamedSharding(make_mesh((1, 1, 8)), PartitionSpec())
    with pytest.raises(PrecisionError, match="one CPU device"):
        prepare(jax.device_put(params, everywhere), activation_bits=8)
