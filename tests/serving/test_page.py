"""The page in a browser: a blank is filled while one looks."""

import itertools
import shutil
import time

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait
from served import NAME

pytest_plugins = ["serving_fixtures"]

_BROWSER, _DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (_BROWSER and _DRIVER), reason="Debian's chromium and chromium-driver are not installed"
)
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--lang=en",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = _BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for option in (*_OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(option)
    browser = webdriver.Chrome(options, webdriver.ChromeService(_DRIVER))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser, served):
    browser.set_window_size(1200, 900)
    browser.get(served.url)
    _wait(browser, lambda: _at(browser, "model").text == NAME)
    yield browser
    assert not [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]


def _at(browser, name):
    return browser.find_element(By.ID, name)


def _wait(browser, condition):
    WebDriverWait(browser, 30, poll_frequency=0.02).until(lambda _: condition())


def _write(browser, text):
    _at(browser, "text").clear()
    _at(browser, "text").send_keys(text)


def _set(browser, name, value):
    if not browser.find_element(By.TAG_NAME, "details").get_attribute("open"):
        browser.find_element(By.TAG_NAME, "summary").click()
    _at(browser, name).clear()
    _at(browser, name).send_keys(value)


def _blanks(browser):
    return [e.text for e in browser.find_elements(By.CSS_SELECTOR, "#answer .blank")]


def _is_done(browser):
    return _at(browser, "figures").text != "" and not _at(browser, "stop").is_enabled()


def test_a_blank_is_filled_while_one_looks(page, model, slow_steps):
    _write(page, "The capital of [MASK] is [MASK].")
    marks = page.find_elements(By.CSS_SELECTOR, "#marked mark")
    assert [mark.get_attribute("textContent") for mark in marks] == ["[MASK]", "[MASK]"]
    _set(page, "max_tokens", "15")
    _at(page, "fill").click()
    seen = []
    while not _is_done(page):
        seen.append(page.execute_script(
            "return [...document.querySelectorAll('#answer .blank')].map(e => e.textContent)"
        ))  # fmt: skip
        time.sleep(0.03)
    growing = [a for i, a in enumerate(seen) if i == 0 or a != seen[i - 1]]
    assert len(growing) > 8  # it came bit by bit
    first = [answer[0] for answer in growing if answer]
    for before, after in itertools.pairwise(first):
        assert after.startswith(before)
    assert len(_blanks(page)) == 2
    answer = _at(page, "answer").text
    assert answer.startswith("The capital of")
    assert answer.endswith(".")
    assert _blanks(page)[0] in answer
    colours = {
        name: page.execute_script(
            f"return getComputedStyle(document.querySelector('#answer .{name}')).backgroundColor"
        )
        for name in ("blank", "text")
    }
    assert colours["blank"] != colours["text"]
    assert "30 tokens" in _at(page, "figures").text


def test_all_by_keyboard_and_in_chinese(page):
    Select(_at(page, "language")).select_by_value("zh")
    assert _at(page, "fill").text == "填空"
    assert page.find_element(By.TAG_NAME, "html").get_attribute("lang") == "zh"
    _write(page, "日本的首都是")
    _at(page, "text").send_keys(Keys.TAB, Keys.ENTER)  # the first button: [MASK]
    assert _at(page, "text").get_attribute("value") == "日本的首都是[MASK]"
    page.switch_to.active_element.send_keys("。", Keys.CONTROL, Keys.ENTER)
    _wait(page, lambda: _is_done(page))
    assert _at(page, "answer").text.startswith("日本的首都是")
    assert "个词元" in _at(page, "figures").text
    page.refresh()
    assert _at(page, "fill").text == "填空"  # it is remembered
    Select(_at(page, "language")).select_by_value("en")


def test_an_answer_is_stopped(page, model, slow_steps):
    _write(page, "The currency of Poland is")
    _set(page, "max_tokens", "100")
    _at(page, "text").send_keys(Keys.CONTROL, Keys.ENTER)
    _wait(page, lambda: any(_blanks(page)))
    _at(page, "text").send_keys(Keys.ESCAPE)
    _wait(page, lambda: _at(page, "figures").text == "Stopped.")
    _wait(page, lambda: model.engine.is_idle)
    assert _at(page, "fill").is_enabled()


def test_what_is_wrong_is_said(page):
    _write(page, "[MASK] " + "word " * 300)
    _at(page, "text").send_keys(Keys.CONTROL, Keys.ENTER)
    _wait(page, lambda: _at(page, "error").is_displayed())
    assert "no room for an answer" in _at(page, "error").text
    page.get_log("browser")  # the browser notes every answer of 400


def test_a_phone_shows_all_of_it(page):
    for width in (360, 500):
        page.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 740, "deviceScaleFactor": 2, "mobile": True},
        )
        _write(page, "The capital of [MASK] is " + "Donaudampfschifffahrt" * 3)
        _at(page, "fill").click()
        _wait(page, lambda: _is_done(page))
        scroll = "return document.documentElement.scrollWidth"
        assert page.execute_script(scroll) <= width
        for button in page.find_elements(By.TAG_NAME, "button"):
            box = button.rect
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            assert box["height"] >= 40  # for a finger
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_control_has_a_name(page):
    names = page.execute_script(
        "return [...document.querySelectorAll('button, select, input, textarea')]"
        ".map(e => [e.id, (e.textContent + (e.labels ? [...e.labels].map(l => l.textContent)"
        ".join('') : '')).trim()])"
    )
    assert len(names) >= 15
    assert all(name for _, name in names), names


def test_nothing_comes_from_elsewhere(page, served):
    page.get_log("performance")
    page.refresh()
    _wait(page, lambda: _at(page, "model").text == NAME)
    asked = [
        entry["message"].split('"url":"')[1].split('"')[0]
        for entry in page.get_log("performance")
        if "Network.requestWillBeSent" in entry["message"] and '"url":"http' in entry["message"]
    ]
    assert asked
    assert all(url.startswith(served.url) for url in asked), asked
