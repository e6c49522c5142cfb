"""A server's metrics, in Prometheus' format."""

import collections
import time
from collections.abc import Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from glm_jax.engine.engine import Engine
from glm_jax.engine.scheduler import SchedulingCounts
from glm_jax.engine.speculation import DraftCounts

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_WINDOW = 10.0  # seconds over which tokens per second are counted


class Metrics:
    """Metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        register: Any = {"registry": self._registry}
        self._waiting = Gauge("glm_queue_length", "Answers that wait for a slot.", **register)
        self.waiting_tokens = Gauge(
            "glm_queue_tokens", "Tokens of answers without a first token.", **register
        )
        self._running = Gauge("glm_slots_running", "Slots in use.", **register)
        self._slots = Gauge("glm_slots", "Number of slots.", **register)
        self._searches = Gauge("glm_searches", "Beam searches, waiting or running.", **register)
        self.ready = Gauge("glm_ready", "1 while the model answers.", **register)
        self._rate = Gauge("glm_tokens_per_second", f"Over {_WINDOW:g} seconds.", **register)
        self._rate.set_function(self._tokens_per_second)
        self.prompt_tokens = Counter("glm_prompt_tokens", "Tokens of prompts.", **register)
        self._generated = Counter(
            "glm_generated_tokens", "Generated tokens, without beam searches.", **register
        )
        self._drafts = DraftCounts(0, 0)
        self._draft_tokens = (
            Counter("glm_draft_tokens", "Draft tokens that steps checked.", **register),
            Counter("glm_accepted_draft_tokens", "Those of them that were accepted.", **register),
        )
        self._scheduling = SchedulingCounts(0, 0)
        self._scheduled = (
            Counter("glm_preemptions", "Requests that gave up their pages.", **register),
            Counter("glm_shared_prompts", "Prompts that another request had.", **register),
        )
        self.requests = Counter(
            "glm_requests", "Answered requests.", ["endpoint", "status"], **register
        )
        self.request_seconds = Histogram(
            "glm_request_seconds",
            "Time from a request to the end of its answer.",
            ["endpoint"],
            buckets=_SECONDS,
            **register,
        )
        self.first_token_seconds = Histogram(
            "glm_time_to_first_token_seconds",
            "Time from a request to its first token.",
            buckets=_SECONDS,
            **register,
        )
        self.next_token_seconds = Histogram(
            "glm_time_per_output_token_seconds",
            "Mean time between the tokens of an answer.",
            buckets=(0.001, 0.0025, *_SECONDS[:12]),
            **register,
        )
        self._recent: collections.deque[tuple[float, int]] = collections.deque()

    def observe_load(self, engine: Engine, searches: int) -> None:
        """Set the gauges of the engine's load, and count drafts and preemptions."""
        self._waiting.set(engine.waiting)
        self._running.set(engine.running)
        self._slots.set(engine.slots)
        _increase(self._draft_tokens, engine.drafts, self._drafts)
        _increase(self._scheduled, engine.scheduling, self._scheduling)
        self._drafts, self._scheduling = engine.drafts, engine.scheduling
        self._searches.set(searches)

    def count_tokens(self, count: int) -> None:
        """Count the tokens of one step of the engine."""
        self._generated.inc(count)
        now = time.monotonic()
        self._recent.append((now, count))
        while self._recent[0][0] < now - _WINDOW:
            self._recent.popleft()

    def _tokens_per_second(self) -> float:
        since = time.monotonic() - _WINDOW
        return sum(count for at, count in self._recent.copy() if at >= since) / _WINDOW

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


def _increase(counters: Sequence[Counter], now: Sequence[int], before: Sequence[int]) -> None:
    for counter, *counts in zip(counters, now, before, strict=True):
        counter.inc(counts[0] - counts[1])


class AnswerTimes:
    """Measures the time to an answer's first token, and between the others."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._began = time.perf_counter()
        self._first: float | None = None
        self._tokens = 0

    def token(self) -> None:
        """Note that a token has arrived."""
        self._tokens += 1
        if self._first is None:
            self._first = time.perf_counter()
            self._metrics.first_token_seconds.observe(self._first - self._began)

    def end(self) -> None:
        """Note that the answer has ended."""
        if self._first is not None and self._tokens > 1:
            spent = time.perf_counter() - self._first
            self._metrics.next_token_seconds.observe(spent / (self._tokens - 1))
