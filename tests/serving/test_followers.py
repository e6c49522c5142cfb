"""A model of several processes: what one decides the others repeat, and each hears of its end."""

import dataclasses
import multiprocessing
import socket
import threading
import time

import httpx2
import pytest
from served import ASKED, Served, error_of, post, tiny_served, wait_idle

from glm_jax.engine.beam_search import BeamSearch
from glm_jax.engine.embedding import embedded_sequence
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request
from glm_jax.engine.stepwise import replayable
from glm_jax.errors import UserError
from glm_jax.generation.beam_filling import filling_by_beams
from glm_jax.generation.blank_filling import (
    PartlyFilled,
)
from glm_jax.generation.driver import Search, SingleRequest
from glm_jax.generation.scored_texts import continuation, score_choices
from glm_jax.generation.shared_scoring import Scoring
from glm_jax.generation.text_request import TextRequest
from glm_jax.processes import ProcessesError
from glm_jax.serving import links
from glm_jax.serving.links import (
    AskedToEnd,
    End,
    Failed,
    Followers,
    Leader,
    LostProcessError,
    Ready,
)
from glm_jax.serving.replay import (
    Begin,
    Cancel,
    CommandedDriver,
    Compiled,
    DifferenceError,
    Orders,
    decode,
    encode,
)

LAUNCHES = [
    (Engine, "_run_step"),
    (Engine, "_run_layers"),
]


@pytest.fixture
def ends():
    """Process 0's connection to one other, and that one's."""
    first, second = multiprocessing.Pipe()
    return Followers({1: first}), Leader(second, 1, 2)


@pytest.fixture(scope="module")
def model(tokenizer):
    """With few programs to compile."""
    return tiny_served(tokenizer, EngineSettings(2, 32, None, 16, 32, 32))


@pytest.fixture
def twin(model):
    """The same model as another process has it."""
    engine = Engine(model.params, model.config, model.engine._settings)
    return dataclasses.replace(model, engine=engine)


@pytest.fixture
def launches(monkeypatch):
    """What each thread launches on devices, in order, and on which pages."""
    launched = {}

    def record(kind, name):
        real = getattr(kind, name)

        def launch(self, *args):
            launched.setdefault(threading.current_thread().name, []).append((name, str(args)))
            return real(self, *args)

        monkeypatch.setattr(kind, name, launch)

    for kind, name in LAUNCHES:
        record(kind, name)
    return launched


def _follow(leader, model, turns):
    """What a follower's thread does, without a process that ends."""
    driver = CommandedDriver(model.engine, is_alone=False)
    leader.send(Ready())
    while isinstance(orders := leader.receive(), Orders):
        driver.repeat(orders, model)
        turns.append(orders.takes_turn)


def test_a_follower_launches_what_process_0_launches(model, twin, ends, launches):
    """Answers that share slots, a client that goes away, and what is refused."""
    followers, leader = ends
    turns = []
    following = threading.Thread(target=_follow, args=[leader, twin, turns], name="follower")
    following.start()
    served = Served(lambda: model, followers=followers)
    try:
        served.wait_ready()
        short = ASKED | {"max_tokens": 5}
        with httpx2.stream("POST", served.url + "/v1/completions", json=ASKED | {"stream": True}):
            whole = post(served, json=short | {"n": 2, "stop": ["a"]})
            filled = post(
                served,
                "/v1/fill",
                json={"text": "The [MASK] of [MASK].", "seed": 1, "max_tokens": 4},
            )
            error_of(post(served, json=ASKED | {"temperature": -1}), 400)
        assert {x.status_code for x in (whole, filled)} == {200}
        wait_idle(served)
        time.sleep(0.1)
        before = len(turns)
        time.sleep(0.2)
        assert len(turns) == before  # nothing is sent while nothing is asked
    finally:
        served.drain()
        served.join()
        followers.end()
        following.join(60)
    assert not following.is_alive()
    assert {name for name, _ in launches["engine"]} == {name for _, name in LAUNCHES}
    # The first are those of compiling, which the twin leaves out.
    assert launches["follower"] == launches["engine"][-len(launches["follower"]) :]
    assert twin.engine.is_idle


def test_what_a_command_names_is_found_in_the_other_process(model, twin):
    """A search and a score are made of parts of the model, which are not copied."""
    special = model.tokenizer.special_tokens
    partly = PartlyFilled.begin(model.tokenizer, "The [MASK] of", 32)
    searching = Search(filling_by_beams(model.params, model.config, partly, BeamSearch(2), 3))
    text = continuation((), (5, 6), special)
    scoring = Scoring(model.scorer.steps([text]))
    choosing = Scoring(score_choices(model.scorer, model.tokenizer, "A [MASK]", partly, ["b"]))
    embedding = Scoring(model.embedder.steps([embedded_sequence((5, 6), special)]))
    beside = {scoring: "scorer", choosing: "scorer", embedding: "embedder"}
    for number, answer in enumerate((searching, *beside)):
        encoded = encode(Begin(number, answer, ("client", 7)), model)
        assert len(encoded) < 5000
        command = decode(encoded, twin)
        assert (command.number, command.turn) == (number, ("client", 7))
        own = Begin(number, command.answer, command.turn)
        assert encode(own, twin) == encoded  # as it was
        arguments = command.answer._steps._args
        assert arguments[0] is getattr(twin, beside.get(answer, "params"))
    assert decode(encode(Cancel(3), model), twin) == Cancel(3)
    guide = TextRequest(guided_choice=("a", "b")).guide(model.tokenizer)
    guided = SingleRequest(Request(Prompt((5, special.gmask), None, adapter=1), guide=guide))
    command = decode(encode(Begin(5, guided, ("client", 7)), model), twin)
    request = command.answer.next_work()
    assert request == guided.next_work()
    assert request.guide.vocabulary is guide.vocabulary
    next(scoring._steps)
    with pytest.raises(TypeError, match="have begun"):
        encode(Begin(4, scoring, ("client", 7)), model)


class Stub(Engine):
    """An engine without a model and without requests."""

    is_idle = True

    def __init__(self):
        pass

    def step(self):
        return []


@replayable
def _compiled_before(log, error=None):
    yield lambda: log.append("compiled")
    log.append("run")
    if error is not None:
        raise error


def test_a_search_goes_on_when_process_0_says_that_its_program_is_compiled():
    log, compiled = [], []
    driver = CommandedDriver(Stub(), is_alone=False, on_compiled=compiled.append)
    driver.do(Begin(0, Search(_compiled_before(log)), ("a", 0)))
    driver.turn()
    _wait_for(lambda: compiled)
    driver.turn()
    assert log == ["compiled"]
    assert driver.driver.is_idle
    driver.do(compiled[0])
    assert not driver.driver.is_idle
    driver.turn()
    assert log == ["compiled", "run"]


@pytest.mark.parametrize(
    ("error", "is_alone", "is_raised"),
    [
        (UserError("no such token"), False, False),
        (MemoryError("here alone"), True, False),
        (MemoryError("here alone"), False, True),
    ],
)
def test_an_error_that_others_may_not_have_ends_the_process(error, is_alone, is_raised):
    driver = CommandedDriver(Stub(), is_alone)
    answer = Search(_compiled_before([], error))
    driver.do(Begin(0, answer, ("a", 0)))
    driver.turn()
    driver.do(Compiled(0))
    if is_raised:
        with pytest.raises(MemoryError):
            driver.turn()
    else:
        assert driver.turn() == [(answer, None)]
        assert answer.error is error


def test_tokens_that_differ_from_process_0_end_a_follower():
    first, other = (CommandedDriver(Stub(), is_alone=False) for _ in range(2))
    begin = Begin(0, Search(_compiled_before([], UserError("no"))), ("a", 0))
    encoded = encode(begin, Model()), encode(Compiled(0), Model())
    other.repeat(Orders(encoded[:1], True, first.checksum), Model())
    with pytest.raises(DifferenceError):
        other.repeat(Orders(encoded[1:], True, first.checksum + 1), Model())


class Model:
    """Without parts."""


def _wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_process_0_hears_of_its_followers(ends):
    followers, leader = ends
    leader.send(Ready())
    followers.wait_ready()
    assert not followers.is_asked
    leader.send(AskedToEnd())
    _wait_for(lambda: followers.is_asked)
    heard = []
    followers.watch(lambda: heard.append((followers.is_asked, followers.failure)))
    assert heard == [(True, None)]
    leader.send(Failed("no such model"))
    _wait_for(lambda: len(heard) == 2)
    failure = followers.failure
    assert isinstance(failure, LostProcessError)
    assert str(failure) == "process 1 of 2 failed: no such model"
    assert heard[1] == (True, failure)
    assert followers.cause(RuntimeError("interrupted")) is failure
    assert followers.cause(own := UserError("its own")) is own
    with pytest.raises(LostProcessError):
        followers.wait_ready()


def test_each_end_hears_that_the_other_is_gone(ends):
    followers, leader = ends
    leader._connection.close()
    _wait_for(lambda: followers.failure)
    assert str(followers.failure).startswith("process 1 of 2 is gone")
    first, second = multiprocessing.Pipe()
    first.close()
    with pytest.raises(LostProcessError, match="process 0 of 2 is gone"):
        Leader(second, 1, 2).receive()


@pytest.mark.parametrize(
    ("failure", "heard"),
    [
        (None, None),
        (LostProcessError("process 2 of 3 is gone"), "process 2 of 3 is gone"),
        (UserError("the port is taken"), "process 0 of 2 failed: the port is taken"),
        (MemoryError("of it"), "process 0 of 2 failed: MemoryError: of it"),
    ],
)
def test_followers_hear_why_it_ends(ends, failure, heard):
    followers, leader = ends
    ending = threading.Thread(target=followers.end, args=[failure])
    ending.start()
    assert leader.receive() == End(heard, at_once=failure is not None)
    assert ending.is_alive()  # until this process is gone
    leader._connection.close()
    ending.join(60)
    assert not ending.is_alive()
    assert followers.failure is None


def test_who_is_no_follower_is_not_connected():
    key, port = b"k" * 32, None
    with links._listening() as listening:
        port = listening.getsockname()[1]
        accepted = []
        accepting = threading.Thread(
            target=lambda: accepted.append(links._accept_all(listening, key, 2))
        )
        accepting.start()
        with socket.create_connection(("127.0.0.1", port)):  # who says nothing
            with pytest.raises(ProcessesError, match="does not reach process 0 at"):
                links._connect_to_first(("127.0.0.1", port), b"another", 1, 2)
            own = links._connect_to_first(("127.0.0.1", port), key, 1, 2)
            accepting.join(60)
        [found] = accepted
        assert list(found) == [1]
        found[1].send("hello")
        assert own.recv() == "hello"


def test_settings_must_be_the_same():
    with pytest.raises(ProcessesError, match="process 2 has slots=8 and process 0 has slots=16"):
        links._check_equal({"slots": 16}, {"slots": 8}, 2)
