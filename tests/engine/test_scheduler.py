"""Whatever comes, goes and is preempted, each request's pages hold its text, and none is lost."""

import collections
import random

import pytest

from glm_jax.engine.page_pool import page_count
from glm_jax.engine.prefill_batch import prefill_length
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request
from glm_jax.engine.scheduler import Scheduler, SchedulerLimits, SchedulingCounts, page_copies

SOP, PAGE, LONGEST, MAX_STEPS = 1, 4, 24, 2000


class _Simulated:
    """An engine without a model: a page's contents are the tokens themselves, and the next token
    is a function of all before it, and of the request's seed."""

    def __init__(self, pages, slots=4, shards=1, step_tokens=1, prefill_steps=1):
        self.limits = SchedulerLimits(
            shards, slots, pages + 1, PAGE, LONGEST, 16, step_tokens, lambda width: prefill_steps
        )
        self.scheduler = Scheduler(self.limits)
        self.contents = [[[None] * PAGE for _ in range(pages + 1)] for _ in range(shards)]
        self.answers = collections.defaultdict(list)
        self.admission, self.steps_left, self.cancelled = None, 0, set()
        self.count = self.longest_running = 0

    def submit(self, request, turn=(None, None), is_urgent=False):
        self.scheduler.add(self.count, request, turn, is_urgent)
        self.count += 1
        return self.count - 1

    def cancel(self, request_id):
        self.scheduler.queue.drop(request_id)
        self.cancelled.add(request_id)
        for slot, one in list(self.scheduler.running.items()):
            if one.admitted.request_id == request_id:
                self.scheduler.pool.free(self.scheduler.leave(slot))

    def step(self, draw):
        """As `Engine.step`."""
        scheduler = self.scheduler
        self._prefill()
        scheduler.grow()
        self._check_pages()
        self.longest_running = max(self.longest_running, len(scheduler.running))
        draft_rooms = scheduler.draft_rooms()
        for slot, one in sorted(scheduler.running.items()):
            admitted = one.admitted
            for _ in range(1 + draw.randint(0, max(0, draft_rooms[slot]))):
                text = [*admitted.request.prompt.tokens(SOP), *one.answer]
                self._write(one.allocation, len(text) - 1, text[-1])
                token = _next_token(admitted.request, text)
                self.answers[admitted.request_id].append(token)
                if token in admitted.request.end_tokens or one.remaining == 1:
                    scheduler.pool.free(scheduler.leave(slot))
                    break
                one.answer.append(token)

    def _prefill(self):
        scheduler = self.scheduler
        while True:
            if self.admission is None:
                self.admission = scheduler.admit()
                self._copy(self.admission.ready)
                for one in self.admission.ready:
                    scheduler.enter(one, frozenset())
                self.steps_left = self.limits.prefill_steps(0) if scheduler.running else 1
            if not self.admission.prefilled:
                self.admission = None
                return
            self.steps_left -= 1
            for one in self.admission.prefilled:
                for index, token in enumerate(one.text.tokens(SOP)[:-1]):
                    self._write(one.allocation, index, token)
            if self.steps_left:
                return
            self._copy(self.admission.followers)
            for one in [*self.admission.prefilled, *self.admission.followers]:
                if one.request_id in self.cancelled:
                    scheduler.pool.free(scheduler.give_up(one))
                else:
                    scheduler.enter(one, frozenset())
            self.admission = None

    def _copy(self, followers):
        for copies in page_copies(followers, self.limits.shards):
            per_shard = copies.reshape(self.limits.shards, -1, 2)
            for contents, pairs in zip(self.contents, per_shard.tolist(), strict=True):
                for source, target in pairs:
                    contents[target] = list(contents[source])

    def _write(self, allocation, index, token):
        page = allocation.pages[index // PAGE]
        self.contents[allocation.shard][page][index % PAGE] = token

    def _check_pages(self):
        """Each page is free or counted as often as it is had, and has what it should."""
        scheduler = self.scheduler
        had = [collections.Counter() for _ in range(self.limits.shards)]
        for one in [*scheduler.running.values(), *scheduler.entering.values()]:
            had[one.allocation.shard].update(one.allocation.pages)
        for shard, counts in enumerate(had):
            free = scheduler.pool._free[shard]
            assert sorted([*free, *counts]) == list(range(1, self.limits.pages))
            assert scheduler.pool._counts[shard] == [counts[i] for i in range(self.limits.pages)]
        for slot, one in scheduler.running.items():
            pages, shard = one.allocation.pages, one.allocation.shard
            assert shard == scheduler.shard(slot)
            assert had[shard][pages[(one.length - 1) // PAGE]] == 1  # it writes there
            written = [x for page in pages for x in self.contents[shard][page]]
            text = [*one.admitted.request.prompt.tokens(SOP), *one.answer]
            assert written[: len(text) - 1] == text[:-1]


def _next_token(request, text):
    return random.Random(f"{request.seed} {text}").randint(2, 9)


def _alone(request):
    """The answer that nothing interrupts."""
    text, answer = list(request.prompt.tokens(SOP)), []
    end = min(LONGEST, len(text) + (request.max_tokens or LONGEST))
    while len(text) < end and not set(answer) & set(request.end_tokens):
        answer.append(_next_token(request, text))
        text.append(answer[-1])
    return answer


def _prompt(context, mask_position=None, prefix=""):
    """Letters are tokens."""
    return Prompt(tuple(map(ord, context)), mask_position, tuple(map(ord, prefix)))


def _random_request(draw):
    context = "".join(draw.choice("abc") for _ in range(draw.choice([1, 3, 4, 4, 8, 13])))
    return Request(
        _prompt(context, draw.choice([None, 0]), "xy"[: draw.randint(0, 2)]),
        max_tokens=draw.choice([None, 1, 3, 9, 30]),
        seed=draw.randint(0, 3),
        end_tokens=draw.choice([(), (2,)]),
        priority=draw.choice([0, 0, 0, -1, 2]),
    )


def test_random_schedules_give_what_each_request_gets_alone():
    total = collections.Counter()
    for seed in range(30):
        total.update(_random_schedule(random.Random(seed))._asdict())
    assert min(total.values()) > 40, total  # else it shows nothing


def _random_schedule(draw):
    shards = draw.choice([1, 1, 2])
    engine = _Simulated(
        pages=draw.choice([6, 7, 9, 14]),
        slots=shards * draw.choice([1, 3, 5]),
        shards=shards,
        step_tokens=draw.choice([1, 1, 4]),
        prefill_steps=draw.choice([1, 1, 3]),
    )
    requests, cancelled = {}, set()
    for _ in range(MAX_STEPS):
        if len(requests) < 30:
            for request in [_random_request(draw)] * draw.choice([0, 0, 1, 1, 3]):
                turn = draw.choice("AB"), draw.choice("xy")
                requests[engine.submit(request, turn, draw.random() < 0.2)] = request
        elif engine.scheduler.is_idle:
            break
        if requests and draw.random() < 0.03:
            request_id = draw.choice(list(requests))
            cancelled.add(request_id)
            engine.cancel(request_id)
        engine.step(draw)
    assert engine.scheduler.is_idle
    for request_id, request in requests.items():
        expected, got = _alone(request), engine.answers[request_id]
        assert got == (expected[: len(got)] if request_id in cancelled else expected)
    engine._check_pages()
    assert not engine.scheduler.queue._entries
    return engine.scheduler.counts


def _run(engine, until_idle=True):
    """The order in which requests end."""
    draw, ended, before = random.Random(0), [], None
    for _ in range(MAX_STEPS):
        engine.step(draw)
        there = {one.admitted.request_id for one in engine.scheduler.running.values()}
        ended += sorted((before or set()) - there - set(_waiting(engine)))
        before = there
        if engine.scheduler.is_idle:
            return ended
    raise AssertionError("it does not end")


def _waiting(engine):
    entries, running = engine.scheduler.queue._entries, engine.scheduler.running.values()
    return set(entries) - {one.admitted.request_id for one in running}


def _long(first, priority=0, max_tokens=None):
    return Request(_prompt(first * 3), max_tokens=max_tokens, end_tokens=(), priority=priority)


def test_more_requests_run_than_would_fit_at_their_longest():
    """Room for one of the longest: four short answers that might have been long run at once."""
    engine = _Simulated(pages=page_count(LONGEST, PAGE))
    for first in "abcd":
        engine.submit(Request(_prompt(first), end_tokens=tuple(range(10))))
    _run(engine)
    # Each has one page, and room to grow by a few tokens more.
    assert engine.longest_running == 4
    assert engine.scheduler.counts.preemptions == 0


@pytest.mark.parametrize("priorities", [(0, 0, 0), (0, 0, -1), (5, 0, 1)])
def test_who_goes_last_is_preempted_and_who_goes_first_never(priorities, monkeypatch):
    engine = _Simulated(pages=page_count(LONGEST, PAGE) + 1)
    for first, priority in zip("abc", priorities, strict=True):
        engine.submit(_long(first, priority))
    preempted, order = [], sorted(range(3), key=lambda i: (priorities[i], i))
    real = engine.scheduler.queue.put_back
    monkeypatch.setattr(
        engine.scheduler.queue, "put_back", lambda i, item: preempted.append(i) or real(i, item)
    )
    assert _run(engine) == order
    assert engine.scheduler.counts.preemptions == len(preempted) > 1
    assert preempted[0] == order[-1]
    assert order[0] not in preempted
    for request_id in range(3):
        request = _long("abc"[request_id])
        assert engine.answers[request_id] == _alone(request)


def test_equal_prompts_are_prefilled_once_while_one_of_them_runs():
    engine = _Simulated(pages=40, slots=3)
    request = Request(_prompt("abcdefghi"), max_tokens=5, end_tokens=())
    for _ in range(3):
        engine.submit(request)
    engine.step(random.Random(0))
    assert engine.scheduler.counts == SchedulingCounts(0, 2)
    tables = [one.allocation.pages for one in engine.scheduler.running.values()]
    full = prefill_length(request.prompt) // PAGE
    assert len({pages[:full] for pages in tables}) == 1
    assert len({pages[full] for pages in tables}) == 3
    engine.submit(request)  # waits for a slot; another runs until then
    engine.submit(Request(_prompt("abcdefghi", 2), max_tokens=5, end_tokens=()))  # unequal
    _run(engine)
    assert engine.scheduler.counts.shared_prompts in (2, 3)
    assert all(engine.answers[number] == _alone(request) for number in range(4))
