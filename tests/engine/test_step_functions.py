"""A prefill and decode steps over pages give what one pass over whole texts gives, whoever shares
the pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN  # noqa: F401  # imports of jax come after it

from glm_jax.engine import step_functions
from glm_jax.engine.page_pool import PageAllocation, PagePool, table_size
from glm_jax.engine.prefill_batch import make_prefill_batch
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.step_functions import Rows
from glm_jax.model import glm
from glm_jax.model.layer_stacks import unstack_layers
from glm_jax.model.visibility import Visibility

PAGE, PAGES, SOP = 4, 16, 244
CONTEXTS = ((5, 9, 33, 7, 8, 11, 90, 240), (60, 61, 240, 62, 240))
ANSWERS = ((12, 13, 14), (15, 16, 17))


class _Cached:
    """Prompts in pages, and their next tokens run one after another."""

    def __init__(self, config, params, dtype=None):
        self.params, self.config = params, config.replace(cache_dtype=dtype)
        is_apart = isinstance(params.layers, tuple)
        self.pages_a_layer = 0 if is_apart else PAGES
        self.cache = step_functions.make_cache(params, self.config, PAGES, PAGE)
        self.pool = PagePool(1, PAGES, PAGE)
        prompts = [Prompt(context, None) for context in CONTEXTS]
        self.rows = [self.pool.allocate(0, 16) for _ in prompts]
        batch = make_prefill_batch(
            list(zip(prompts, self.rows, strict=True)), 1, 32, PAGE, self.pages_a_layer, SOP
        )
        x = step_functions.embed(params, self.config, batch)
        layers = config.num_layers
        _, self.cache = step_functions.prefill(params, self.config, x, batch, self.cache, 0, layers)

    def run(self, tokens, index):
        """Logits after each row's token."""
        return self.run_several([[token] for token in tokens], index)[:, 0]

    def run_several(self, tokens, index, counts=None):
        """Logits after each of the rows' tokens, of which the first `counts` are any."""
        table = np.zeros((len(tokens), table_size(16, PAGE)), np.int32)
        for row, allocation in zip(table, self.rows, strict=True):
            row[: len(allocation.pages)] = allocation.pages
        tokens, index = np.array(tokens, np.int32), np.array(index, np.int32)
        new = np.arange(tokens.shape[1], dtype=np.int32)
        active = new < np.array(counts or [len(new)] * len(tokens))[:, None]
        rows = Rows(active, tokens, index[:, None] + new, index, table)
        logits, self.cache = step_functions.decode(
            self.params, self.config, rows, self.cache, self.pages_a_layer
        )
        return logits

    def answers(self):
        """Logits after sop and after each token of the answers: [tokens, rows, vocab]."""
        tokens = zip(*((SOP, *answer) for answer in ANSWERS), strict=True)
        lengths = [len(context) for context in CONTEXTS]
        return [self.run(some, np.array(lengths) + n) for n, some in enumerate(tokens)]


def _whole(config, params, context, answer):
    """Logits after sop and each token of the answer, by one pass."""
    tokens = jnp.array([[*context, SOP, *answer]])
    visibility = Visibility.prefix(jnp.array([len(context)]), tokens.shape[1])
    logits = glm.forward(params, config, tokens, jnp.arange(tokens.shape[1])[None], visibility)
    return logits[0, len(context) :]


@pytest.mark.parametrize("is_apart", [False, True])
def test_cached_equals_uncached(tiny_model, is_apart):
    config, params = tiny_model
    params = unstack_layers(params) if is_apart else params
    got = np.stack(_Cached(config, params).answers(), axis=1)
    for logits, context, answer in zip(got, CONTEXTS, ANSWERS, strict=True):
        np.testing.assert_allclose(logits, _whole(config, params, context, answer), atol=1e-5)


@pytest.mark.parametrize("is_apart", [False, True])
def test_several_tokens_a_step_equal_one_at_a_time(tiny_model, is_apart):
    """Rows with different numbers of them, over the ends of pages; those that were no tokens, and
    those that are run again as others, leave nothing behind."""
    config, params = tiny_model
    params = unstack_layers(params) if is_apart else params
    cached = _Cached(config, params)
    lengths = [len(context) for context in CONTEXTS]
    first, second = ((SOP, *answer) for answer in ANSWERS)
    wrong = (9, 9)
    got = cached.run_several([first, (*second[:2], *wrong)], lengths, [4, 2])
    expected = [_whole(config, params, *pair) for pair in zip(CONTEXTS, ANSWERS, strict=True)]
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(got[1, :2], expected[1][:2], atol=1e-5)
    cached.run_several([wrong, wrong], [15, lengths[1] + 2], [0, 2])
    rest = cached.run_several([[3, 3], second[2:]], [15, lengths[1] + 2], [0, 2])
    np.testing.assert_allclose(rest[1], expected[1][2:], atol=1e-5)


@pytest.mark.parametrize("is_apart", [False, True])
def test_a_forked_sequence_shares_pages_until_it_writes(tiny_model, is_apart):
    """Rows that go on from one another, with different tokens, as beams do."""
    config, params = tiny_model
    params = unstack_layers(params) if is_apart else params
    cached = _Cached(config, params)
    [context, _], pool = CONTEXTS, cached.pool
    length = len(context)
    cached.run((SOP, SOP), (length, length))
    first, other = cached.rows
    pool.free(other)
    cached.rows = [first, pool.fork(first)]
    copies = []
    for row, tokens in enumerate(cached.rows):
        cached.rows[row], copy = pool.make_writable(tokens, length + 1)
        copies += [copy] if copy else []
    [(source, target)] = copies
    assert source in first.pages
    assert set(cached.rows[0].pages) ^ set(cached.rows[1].pages) == {source, target}
    cached.cache = step_functions.copy_pages(
        cached.cache, np.array([source, 0]), np.array([target, 0]), cached.pages_a_layer
    )
    for step in range(3):
        tokens = [answer[step] for answer in ANSWERS]
        got = cached.run(tokens, (length + 1 + step, length + 1 + step))
    for logits, answer in zip(got, ANSWERS, strict=True):
        expected = _whole(config, params, context, answer)[-1]
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_a_page_is_free_when_its_last_sequence_is():
    pool = PagePool(1, 5, PAGE)
    first = pool.allocate(0, 2 * PAGE + 1)
    assert pool.free_pages(0) == 1
    second = pool.fork(first)
    pool.free(first)
    assert pool.free_pages(0) == 1
    assert pool.make_writable(second, 3) == (second, None)
    third, copy = pool.make_writable(pool.fork(second), 2 * PAGE)
    assert copy is None  # nothing is written in that page yet
    assert third.pages[:2] == second.pages[:2]
    assert third.pages[2] not in second.pages
    pool.free(second)
    pool.free(third)
    assert pool.free_pages(0) == 4
    assert set(pool.allocate(0, 4 * PAGE).pages) == {1, 2, 3, 4}
    assert isinstance(third, PageAllocation)


@pytest.mark.parametrize("is_apart", [False, True])
def test_a_cache_in_less_precision_changes_scores_a_little(tiny_model, is_apart):
    """Of 8 bits a head and position, and of bfloat16."""
    config, params = tiny_model
    params = unstack_layers(params) if is_apart else params
    exact = _Cached(config, params).answers()
    for dtype, tolerance in (("bfloat16", 2e-2), ("int8", 3e-2)):
        cached = _Cached(config, params, dtype)
        assert jax.tree.leaves(cached.cache)[0].dtype == dtype
        for got, expected in zip(cached.answers(), exact, strict=True):
            error = jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)
            assert 1e-5 < error < tolerance
