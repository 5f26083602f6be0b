"""The page in a real browser: what a rater sees and does, from the first prompt to the stored answers."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from studies import MODELS, PROMPTS, make_study, plain_answers, write_answers

from distill.__main__ import main
from distill.raters.answers import is_name, parse
from distill.raters.items import ITEMS, QUESTIONS
from distill.raters.serve import Answered, Server
from distill.raters.study import Study, read_key

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
ANSWERS = len(MODELS) * len(ITEMS) + len(QUESTIONS)  # per prompt

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("browser"))


@pytest.fixture
def study(folder: Path) -> Study:
    return read_key(folder)


@pytest.fixture
def answered(folder: Path, tmp_path: Path) -> Answered:
    return Answered(tmp_path / "answers", read_key(folder))


@pytest.fixture
def url(folder: Path, answered: Answered) -> Iterator[str]:
    with Server("127.0.0.1", 0, folder / "page", answered) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[[str], Any]]:
    """Opens an address with storage of its own. Scripts throw nothing and ask no other site."""
    pages, thrown, asked = [], list[str](), list[str]()

    def new(address: str, context: Any = None) -> Any:
        page = (context or browser.new_context()).new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: thrown.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        pages.append((page, address))
        return page

    yield new
    for page, _ in pages:
        page.close()
    assert not thrown
    begin = tuple(address.partition("?")[0].removesuffix("index.html") for _, address in pages)
    assert not [url for url in asked if not url.startswith((*begin, "data:", "blob:"))]


def start(page: Any, rater: str) -> None:
    page.fill("#name", rater)
    page.press("#name", "Enter")
    page.wait_for_selector("#rating:visible")


def order(page: Any) -> list[Any]:
    return page.evaluate("order.map((prompt) => [prompt.id, prompt.videos])")


def rate(page: Any, key: str = "4", best: str = "b") -> None:
    """Answer all of a prompt by keys alone."""
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press(key)  # goes to the first question
    for _ in range(ANSWERS):
        name = page.evaluate("document.activeElement.name")
        page.keyboard.press(best if name.startswith("best/") else key)
    assert "complete" in page.inner_text("#count")
    assert page.evaluate("document.activeElement.id") == "next", "Enter goes on"


def click_all(page: Any) -> None:
    """Answer all of a prompt at once: 5, and the last video."""
    page.evaluate("document.querySelectorAll('#answers fieldset').forEach((one) => [...one.elements].at(-1).click())")
    assert "complete" in page.inner_text("#count")


def test_a_rater_rates_is_interrupted_goes_on_and_is_scored(
    opened: Callable[..., Any], url: str, folder: Path, answered: Answered, study: Study
) -> None:
    page = opened(f"{url}?rater=07")
    page.wait_for_function("() => document.activeElement.id === 'name'")
    page.keyboard.press("Enter")
    shown = order(page)
    page.wait_for_function("() => [...document.querySelectorAll('video')].every((one) => one.currentTime > 0)")
    assert page.evaluate("[...document.querySelectorAll('video')].map((one) => one.duration)") == [
        study.prompts[int(shown[0][0]) - 1].seconds
    ] * len(MODELS)
    assert PROMPTS[int(shown[0][0]) - 1] in page.inner_text("#prompt")
    page.click("#next")
    assert page.inner_text("#note") == "Please answer what is marked first."
    rate(page, "4", "b")
    page.keyboard.press("Enter")
    assert page.inner_text("#count").startswith("Prompt 2 of 3")
    for key in "251":
        page.keyboard.press(key)  # the first one goes to the first question
    half = page.inner_text("#count")
    assert half == f"Prompt 2 of 3 · {ANSWERS - 2} answers to give"

    page.reload()
    page.wait_for_selector("#rating:visible")
    assert page.inner_text("#count") == half
    assert page.evaluate("[...document.querySelectorAll('input:checked')].map((one) => one.value)") == ["5", "1"]
    assert order(page) == shown

    # A tab that was closed, opened anew.
    other = opened(url, page.context)
    assert other.inner_text("#count") == half
    other.click("#back")
    assert other.locator("input:checked").count() == ANSWERS
    other.click("#next")
    rate(other, "3", "a")
    other.click("#next")
    click_all(other)
    assert other.inner_text("#next") == "Finish"
    other.click("#next")
    other.wait_for_selector(".stored")
    (stored,) = answered.folder.iterdir()
    assert stored.name == "07.json"
    found = parse(stored.read_text(), study, "stored")
    assert {id: page.shown for id, page in found.pages.items()} == {id: tuple(videos) for id, videos in shown}
    first, second, third = (found.pages[id] for id, _ in shown)
    assert set(first.scores[first.shown[1]].values()) == {4}
    assert set(first.best.values()) == {first.shown[1]}
    assert [second.scores[video]["object_class"] for video in second.shown] == [5, 1]
    assert [second.scores[video]["imaging_quality"] for video in second.shown] == [3, 3]
    assert set(third.best.values()) == {third.shown[-1]}

    out = ["--study", str(folder), "--answers", str(answered.folder), "--out", str(answered.folder / "out")]
    assert main(["questionnaire", "score", "--draws", "20", *out]) == 0
    scores = json.loads((answered.folder / "out" / "scores.json").read_text())
    chosen = [study.prompts[int(id) - 1].videos[page.best["overall"]] for id, page in found.pages.items()]
    assert scores["preference"]["overall"][MODELS[0]][0] == pytest.approx(chosen.count(MODELS[0]) / 3)
    other.reload()
    assert other.inner_text("#sent").startswith("Your answers are stored")


def test_the_order_follows_from_the_rater(opened: Callable[..., Any], url: str, study: Study) -> None:
    page = opened(url)
    orders = page.evaluate(
        "(names) => names.map((name) => orderFor(STUDY, name).map((row) => [row.id, row.videos]))",
        [f"{number:02}" for number in range(300)],
    )
    start(page, "17")
    assert order(page) == orders[17]
    again = opened(url)
    start(again, "17")
    assert order(again) == orders[17]
    for found in orders:
        assert sorted(id for id, _ in found) == ["1", "2", "3"]
        assert all(sorted(videos) == sorted(study.prompts[int(id) - 1].videos) for id, videos in found)
    # Six orders of prompts, and eight of the videos in them: all come about equally often.
    prompts = ["".join(id for id, _ in found) for found in orders]
    assert min(prompts.count(one) for one in set(prompts)) > 25
    assert len(set(prompts)) == 6
    for prompt in study.prompts:
        first = [dict(map(tuple, found))[prompt.id][0] for found in orders]
        assert 115 < first.count(next(iter(prompt.videos))) < 185


def test_names_are_those_that_the_server_takes(opened: Callable[..., Any], url: str) -> None:
    page = opened(url)
    names = [
        "07",
        "Jürgen",
        "山田 太郎",
        "a.b@c",
        "x" * 40,
        "x" * 41,
        "",
        ".",
        "a/b",
        "a\\b",
        "a\nb",
        "\u200b",
        "con'd",
    ]
    names += ["a\u2028b", "\U0001f600", "𠮷" * 40]
    assert page.evaluate("(names) => names.map((name) => NAME.test(name))", names) == [is_name(name) for name in names]
    page.fill("#name", "a/b")
    page.press("#name", "Enter")
    assert page.inner_text("#name-error").startswith("A name has no / or")
    assert page.locator("#rating").is_hidden()


def finish(page: Any) -> None:
    for _ in PROMPTS:
        click_all(page)
        page.click("#next")
    page.wait_for_selector("#done:visible")


def test_a_name_that_has_answered_is_told_and_keeps_its_answers(
    opened: Callable[..., Any], url: str, answered: Answered, study: Study, tmp_path: Path
) -> None:
    write_answers(answered.folder, plain_answers(study, 1))
    before = (answered.folder / "01.json").read_bytes()
    page = opened(url)
    start(page, "01")
    finish(page)
    page.wait_for_function("() => document.querySelector('#sent').textContent.includes('not stored')")
    assert "got others of rater '01' before" in page.inner_text("#sent")
    assert (answered.folder / "01.json").read_bytes() == before
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "01.json"
    download.value.save_as(tmp_path / "sent.json")
    assert len(parse((tmp_path / "sent.json").read_text(), study, "sent").pages) == 3


def test_a_server_that_was_away_gets_them_later(opened: Callable[..., Any], url: str, answered: Answered) -> None:
    page = opened(url)
    page.route("**/answers", lambda route: route.abort())
    start(page, "05")
    finish(page)
    page.wait_for_function("() => document.querySelector('#sent').textContent.includes('not stored')")
    page.unroute("**/answers")
    page.click("#send")
    page.wait_for_selector(".stored")
    assert [path.name for path in answered.folder.iterdir()] == ["05.json"]


def test_without_a_server_the_page_gives_a_file(
    opened: Callable[..., Any], folder: Path, study: Study, tmp_path: Path
) -> None:
    """Opened from a disk; also half-way, with the prompts that are finished."""
    page = opened((folder / "page" / "index.html").as_uri())
    start(page, "Ann")
    click_all(page)
    page.click("#next")
    for name, link, count in (("half", "#so-far", 1), ("all", "#download", 3)):
        if name == "all":
            click_all(page)
            page.click("#next")
            click_all(page)
            page.click("#next")
            assert "only in this browser" in page.inner_text("#sent")
        with page.expect_download() as download:
            page.click(link)
        download.value.save_as(tmp_path / name)
        assert len(parse((tmp_path / name).read_text(), study, name).pages) == count


def test_two_raters_share_a_browser(opened: Callable[..., Any], url: str) -> None:
    page = opened(url)
    start(page, "01")
    click_all(page)
    page.click("#next")
    page.click("#change")
    start(page, "02")
    assert page.inner_text("#count").startswith("Prompt 1 of 3")
    assert page.locator("input:checked").count() == 0
    page.click("#change")
    start(page, "01")
    assert page.inner_text("#count").startswith("Prompt 2 of 3")


def test_every_control_has_a_name(opened: Callable[..., Any], url: str) -> None:
    page = opened(url)
    start(page, "01")
    first = page.get_by_role("group", name="Object class accuracy, video A")
    first.get_by_role("radio", name="4, Agree").check()
    assert page.inner_text("#count").endswith(f"{ANSWERS - 1} answers to give")
    page.get_by_role("group", name="Motion quality: which video is best?").get_by_role("radio", name="Video B").check()
    assert page.get_by_role("radio").count() == len(MODELS) * len(ITEMS) * 5 + len(QUESTIONS) * len(MODELS)
    unnamed = "[...document.querySelectorAll('input, button, a, video, progress')].filter((one) =>"
    unnamed += " !one.hidden && !(one.ariaLabel ?? '').trim() && !one.textContent.trim() && !one.labels?.length)"
    assert page.evaluate(f"{unnamed}.length") == 0
