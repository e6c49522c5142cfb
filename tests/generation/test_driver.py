"""A driver's turns: requests, searches and what follows on them, beside one another."""

from concurrent.futures import Future

import pytest

from glm_jax.engine.engine import Engine
from glm_jax.engine.prompt import Prompt
from glm_jax.engine.request import Request, Token
from glm_jax.errors import UserError
from glm_jax.generation.driver import Answer, Driver, Search, SingleRequest, drive

SLOTS = 2


class CountingEngine(Engine):
    """An engine without a model: each request in a slot gets the tokens 0, 1, .."""

    slots = SLOTS

    def __init__(self):
        self.requests, self.turns, self.urgent = {}, {}, []
        self._count = 0

    @property
    def is_idle(self):
        return not self.requests

    @property
    def waiting(self):
        return max(0, len(self.requests) - SLOTS)

    def submit(self, request, is_urgent=False, turn=None):
        if request.max_tokens == 0:
            raise UserError("no tokens")
        number, self._count = self._count, self._count + 1
        self.requests[number], self.turns[number] = (request, 0), turn
        self.urgent += [number] * is_urgent
        return number

    def cancel(self, number):
        self.requests.pop(number, None)

    def step(self):
        tokens = []
        for number, (request, count) in list(self.requests.items())[:SLOTS]:
            reason = "length" if count + 1 == request.max_tokens else None
            tokens.append(Token(number, count, 0.0, reason))
            self.requests[number] = (request, count + 1)
            if reason is not None:
                del self.requests[number]
        return tokens


def request(max_tokens):
    return SingleRequest(Request(Prompt((1,), None), max_tokens=max_tokens))


class Repeated(Answer):
    """Several requests one after another, each of one token more."""

    def __init__(self, count):
        self.count, self.received = count, []

    def next_work(self):
        begun = self.received.count(0)
        return None if begun == self.count else Request(Prompt((1,), None), max_tokens=begun + 1)

    def receive(self, token):
        self.received.append(token.token)
        return False


class Enough(SingleRequest):
    def receive(self, token):
        super().receive(token)
        return token.token == 1


class InPairs(CountingEngine):
    """A step gives two tokens to each request."""

    def step(self):
        return sorted(super().step() + super().step(), key=lambda token: token.request_id)


class Broken(SingleRequest):
    def receive(self, token):
        raise ValueError("a fault of ours")


def search(log, name, count, error=None, priority=0):
    def steps():
        for number in range(count):
            log.append((name, number))
            yield None
        if error is not None:
            raise error
        return name

    return Search(steps(), priority)


def ended(news):
    return [answer for answer, token in news if token is None]


def test_work_that_follows_is_urgent_and_has_the_same_turn():
    engine = CountingEngine()
    driver, answer = Driver(engine), Repeated(3)
    assert driver.submit(answer, ("client", "request"))
    news = [item for _ in range(6) for item in driver.turn()]
    assert answer.received == [0, 0, 1, 0, 1, 2]
    assert ended(news) == [answer]
    assert news[-1] == (answer, None)
    assert [token.token for _, token in news[:-1]] == answer.received
    assert engine.urgent == [1, 2]
    assert set(engine.turns.values()) == {("client", "request")}
    assert driver.is_idle


def test_searches_of_lower_priorities_go_first():
    driver, log = Driver(CountingEngine()), []
    for name, priority in (("later", 1), ("now", 0), ("sooner", -1)):
        driver.submit(search(log, name, 1, priority=priority))
    while not driver.is_idle:
        driver.turn()
    assert [name for name, _ in log] == ["sooner", "now", "later"]


def test_searches_take_turns_a_step_each_beside_requests():
    driver, log = Driver(CountingEngine()), []
    long, first, second, other = (
        request(9),
        search(log, "first", 2),
        search(log, "second", 1),
        search(log, "other", 1),
    )
    driver.submit(long, ("a", 0))
    for answer, client in ((first, "a"), (second, "a"), (other, "b")):
        driver.submit(answer, (client, 1))
    assert (driver.searches, driver.waiting) == (3, 3)
    turns = [driver.turn() for _ in range(9)]
    assert log == [("first", 0), ("first", 1), ("other", 0), ("second", 0)]
    assert [ended(news) for news in turns] == [
        [],
        [],
        [first],
        [],
        [other],
        [],
        [second],
        [],
        [long],
    ]
    assert [answer.result for answer in (first, second, other)] == ["first", "second", "other"]
    assert len(long.tokens) == 9
    assert driver.is_idle


def test_what_ends_one_answer_ends_no_other():
    log = []
    answers = {
        "sound": request(4),
        "refused": request(0),
        "enough": Enough(Request(Prompt((1,), None), max_tokens=9)),
        "failed": search(log, "failed", 1, UserError("nothing may come")),
        "after": search(log, "after", 1),
    }
    found = list(drive(CountingEngine(), answers.values()))
    assert sorted(map(id, found)) == sorted(map(id, answers.values()))
    errors = {name: str(answer.error) for name, answer in answers.items() if answer.error}
    assert errors == {"refused": "no tokens", "failed": "nothing may come"}
    assert [token.token for token in answers["enough"].tokens] == [0, 1]
    assert len(answers["sound"].tokens) == 4
    assert answers["after"].result == "after"


def test_tokens_past_the_last_of_an_answer_are_nobodys():
    enough, whole = (Enough(Request(Prompt((1,), None), max_tokens=9)) for _ in range(2))
    enough.receive = lambda token: Enough.receive(enough, token) or True  # after one of two
    assert set(drive(InPairs(), [enough, whole])) == {enough, whole}
    assert [token.token for token in enough.tokens] == [0]
    assert [token.token for token in whole.tokens] == [0, 1]


@pytest.mark.parametrize(
    "broken",
    [
        Broken(Request(Prompt((1,), None), max_tokens=2)),
        search([], "broken", 1, ValueError("a fault of ours")),
    ],
)
def test_errors_of_ours_are_the_answers_and_raised_by_drive(broken):
    driver, sound = Driver(CountingEngine()), request(3)
    for answer in (sound, broken):
        driver.submit(answer)
    news = [item for _ in range(3) for item in driver.turn()]
    assert set(ended(news)) == {sound, broken}
    with pytest.raises(ValueError, match="of ours"):
        broken.check()
    with pytest.raises(ValueError, match="of ours"):
        list(drive(CountingEngine(), [Broken(Request(Prompt((1,), None), max_tokens=2))]))


def test_cancelled_answers_are_gone_wherever_they_are():
    engine, log = CountingEngine(), []
    driver = Driver(engine)
    requests = [request(5) for _ in range(SLOTS + 1)]
    searches = [search(log, name, 3) for name in "ab"]
    for answer in (*requests, *searches):
        driver.submit(answer)
    driver.turn()
    for answer in (requests[0], requests[-1], *searches):
        driver.cancel(answer)
        driver.cancel(answer)
    assert driver.searches == 0
    news = [item for _ in range(4) for item in driver.turn()]
    assert {answer for answer, _ in news} == {requests[1]}
    assert driver.is_idle
    assert log == [("a", 0)]


def test_a_search_waits_for_its_program_and_no_other_does():
    compiling = []

    def compile_ahead(program):
        compiling.append((program, Future()))
        return compiling[-1][1]

    def steps():
        yield "program"
        yield None

    driver, answer, beside = Driver(CountingEngine(), compile_ahead), Search(steps()), request(2)
    driver.submit(answer)
    driver.turn()
    assert driver.is_idle  # a turn would do nothing
    driver.submit(beside)
    assert not driver.is_idle
    assert ended([item for _ in range(2) for item in driver.turn()]) == [beside]
    [(program, future)] = compiling
    assert program == "program"
    future.set_result(None)
    assert not driver.is_idle
    assert ended([item for _ in range(2) for item in driver.turn()]) == [answer]


@pytest.mark.parametrize("make", [lambda: request(3), lambda: search([], "s", 3)])
def test_answers_are_taken_as_there_is_room_for_them(make):
    taken, done = 0, 0

    def source():
        nonlocal taken
        for _ in range(20):
            taken += 1
            yield make()

    for _ in drive(CountingEngine(), source()):
        done += 1
        assert taken - done <= 2 * SLOTS + 1
    assert done == 20
