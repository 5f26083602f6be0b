"""The server of a study: parts of videos, answers that are kept whole or not at all, and what it refuses."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from studies import make_study, plain_answers

from distill.__main__ import main
from distill.raters.serve import MOST_BYTES, Answered, Server
from distill.raters.study import Study, read_key

ROOT = Path(__file__).parents[3]
Reply = tuple[int, dict[str, str], bytes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def study(folder: Path) -> Study:
    return read_key(folder)


@pytest.fixture
def answered(study: Study, tmp_path: Path) -> Answered:
    return Answered(tmp_path / "answers", study)


@pytest.fixture
def ask(folder: Path, answered: Answered) -> Iterator[Callable[..., Reply]]:
    """Asks a server; each request has a connection of its own."""
    with Server("127.0.0.1", 0, folder / "page", answered) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def ask(method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
            connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            content = response.read()
            connection.close()
            return response.status, dict(response.getheaders()), content

        yield ask
        server.shutdown()
        thread.join()


def post(ask: Callable[..., Reply], value: Any, **headers: str) -> tuple[int, str]:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    status, _, said = ask("POST", "/answers", body, **{"Content_Type": "application/json"} | headers)
    return status, json.loads(said)["message"]


def test_it_serves_the_page_and_nothing_else(ask: Callable[..., Reply], folder: Path) -> None:
    index = (folder / "page" / "index.html").read_bytes()
    status, headers, content = ask("GET", "/?rater=07")
    assert (status, headers["Content-Type"], content) == (200, "text/html", index)
    assert ask("GET", "/study.js")[2] == (folder / "page" / "study.js").read_bytes()
    assert ask("HEAD", "/page.js")[1]["Content-Length"] == str((folder / "page" / "page.js").stat().st_size)
    for path in ("/key.json", "/../key.json", "/%2e%2e/key.json", "/videos/", "/videos", "//etc/passwd", "/answers"):
        assert ask("GET", path)[0] == 404, path
    assert ask("PUT", "/index.html", b"x")[0] == 501


@pytest.mark.parametrize(
    ("asked", "status", "part"),
    [
        ("bytes=0-99", 206, slice(0, 100)),
        ("bytes=100-", 206, slice(100, None)),
        ("bytes=-50", 206, slice(-50, None)),
        ("bytes=7-7", 206, slice(7, 8)),
        ("bytes=5-99999999", 206, slice(5, None)),
        ("bytes=-99999999", 206, slice(0, None)),
        ("bytes=0-", 206, slice(0, None)),
        ("bytes=99999999-", 416, slice(0, 0)),
        ("bytes=9-3", 200, slice(0, None)),
        ("bytes=-0", 416, slice(0, 0)),
        ("seconds=1-2", 200, slice(0, None)),  # RFC 9110: what is no range of bytes is left alone
        ("bytes=0-1,5-6", 200, slice(0, None)),
        ("bytes=-", 200, slice(0, None)),
    ],
)
def test_parts_of_a_video(
    ask: Callable[..., Reply], folder: Path, study: Study, asked: str, status: int, part: slice
) -> None:
    name = next(iter(study.prompts[0].videos))
    whole = (folder / "page" / "videos" / f"{name}.mp4").read_bytes()
    got, headers, content = ask("GET", f"/videos/{name}.mp4", Range=asked)
    assert (got, content) == (status, whole[part])
    first = part.indices(len(whole))[0]
    ranges = {206: f"bytes {first}-{first + len(content) - 1}/{len(whole)}", 416: f"bytes */{len(whole)}"}
    assert headers.get("Content-Range") == ranges.get(status)


def test_answers_are_kept_as_they_came(
    ask: Callable[..., Reply], answered: Answered, study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    body = json.dumps(plain_answers(study, 7), indent=2).encode()
    assert post(ask, body) == (200, "stored")
    assert post(ask, body) == (200, "stored"), "a page that sends again is told the same"
    assert (answered.folder / "07.json").read_bytes() == body
    assert [path.name for path in answered.folder.iterdir()] == ["07.json"]
    assert "stored 07.json (1 raters)" in capsys.readouterr().err


def test_another_answer_of_the_same_name_is_refused(
    ask: Callable[..., Reply], answered: Answered, study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = plain_answers(study), plain_answers(study) | {"started": "later"}
    post(ask, first)
    status, said = post(ask, second)
    assert (status, said) == (409, "answers: got others of rater '01' before, expected a name that is new")
    assert json.loads((answered.folder / "01.json").read_text()) == first
    assert f"refused: {said}" in capsys.readouterr().err.splitlines()


def test_of_many_at_once_one_wins(ask: Callable[..., Reply], answered: Answered, study: Study) -> None:
    bodies = [plain_answers(study) | {"number": number} for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        statuses = [status for status, _ in pool.map(lambda body: post(ask, body), bodies)]
    assert sorted(statuses) == [200, *[409] * 7]
    assert json.loads((answered.folder / "01.json").read_text()) == bodies[statuses.index(200)]


def without_a_page(value: dict[str, Any]) -> None:
    value["pages"].popitem()


def another_study(value: dict[str, Any]) -> None:
    value["study"] = "another"


def a_path_as_name(value: dict[str, Any]) -> None:
    value["rater"] = "../key"


def six_of_five(value: dict[str, Any]) -> None:
    next(iter(value["pages"]["1"]["scores"].values()))["color"] = 6


def without_an_item(value: dict[str, Any]) -> None:
    del next(iter(value["pages"]["2"]["scores"].values()))["color"]


def unknown_video(value: dict[str, Any]) -> None:
    value["pages"]["1"]["best"]["motion"] = "none"


def video_of_another_prompt(value: dict[str, Any]) -> None:
    value["pages"]["1"]["best"]["motion"] = value["pages"]["2"]["best"]["motion"]


def unknown_prompt(value: dict[str, Any]) -> None:
    value["pages"]["9"] = value["pages"]["1"]


def shown_twice(value: dict[str, Any]) -> None:
    value["pages"]["1"]["shown"] = value["pages"]["1"]["shown"][:1] * 2


def true_as_score(value: dict[str, Any]) -> None:
    next(iter(value["pages"]["1"]["scores"].values()))["color"] = True


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_a_page, "answers: got none to 1 of 3 prompts, expected all"),
        (another_study, "answers: got study 'another', expected "),
        (a_path_as_name, "answers: rater: got '../key', expected a name"),
        (six_of_five, "color: got 6, expected 1 to 5"),
        (true_as_score, "color: got True, expected 1 to 5"),
        (without_an_item, "got no color, expected it"),
        (unknown_video, "answers: prompt 1: best: motion: got 'none', expected a video of the prompt"),
        (video_of_another_prompt, "expected a video of the prompt"),
        (unknown_prompt, "answers: pages: got prompt '9', expected those of the study"),
        (shown_twice, "expected the videos of the prompt, each once"),
    ],
)
def test_answers_that_are_none_are_refused(
    ask: Callable[..., Reply], answered: Answered, study: Study, spoil: Any, said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    value = plain_answers(study)
    spoil(value)
    status, message = post(ask, value)
    assert status == 400
    assert said in message
    assert capsys.readouterr().err.splitlines() == [f"refused: {message}"]
    assert not list(answered.folder.iterdir())


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 10_000, b'{"format": 2}'])
def test_bodies_that_are_no_answers(ask: Callable[..., Reply], answered: Answered, body: bytes) -> None:
    status, message = post(ask, body)
    assert (status, message.startswith("answers: got ")) == (400, True)
    assert not list(answered.folder.iterdir())


def test_requests_that_are_not_read(ask: Callable[..., Reply], answered: Answered, study: Study) -> None:
    good = plain_answers(study)
    assert post(ask, b"", Content_Length=str(MOST_BYTES + 1))[0] == 413
    assert post(ask, b"", Content_Length="-1")[0] == 411
    # What a form of another site may send without asking.
    assert post(ask, good, Content_Type="text/plain")[0] == 415
    assert ask("POST", "/elsewhere", b"{}", Content_Type="application/json")[0] == 404
    assert not list(answered.folder.iterdir())


@pytest.mark.parametrize("name", ["Jürgen", "山田 太郎", "a.b@c.example", "x" * 40, 'con\'d & "so"'])
def test_names_of_people(ask: Callable[..., Reply], answered: Answered, study: Study, name: str) -> None:
    assert post(ask, plain_answers(study) | {"rater": name}) == (200, "stored")
    assert [path.name for path in answered.folder.iterdir()] == [f"{name}.json"]


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", ".hidden", "a/b", "a\\b", "a\nb", "a\0b", "x" * 41, " a", 7, None]
)
def test_names_that_could_name_no_file(
    ask: Callable[..., Reply], answered: Answered, study: Study, name: object
) -> None:
    status, message = post(ask, plain_answers(study) | {"rater": name})
    assert (status, "rater: got" in message) == (400, True)
    assert not list(answered.folder.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--study", "none"], "study: got no none/key.json, expected a folder that `questionnaire make` wrote"),
        (["--port", "99999"], "expected an address to listen on"),
        (["--host", "no.such.host.invalid"], "expected an address to listen on"),
        (["--port", "x"], "expected a valid integer"),
    ],
)
def test_bad_words_of_serve(folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["questionnaire", "serve", "--study", str(folder), *words])
    except SystemExit as ended:  # argparse ends by itself
        status = int(str(ended.code))
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.slow
def test_ctrl_c_ends_it_with_status_0(folder: Path, study: Study, tmp_path: Path) -> None:
    words = ["--study", folder, "--port", "0", "--answers", tmp_path / "kept"]
    command = [sys.executable, "-m", "distill", "questionnaire", "serve", *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ}, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    port = int(process.stderr.readline().partition("127.0.0.1:")[2].partition("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/answers", json.dumps(plain_answers(study)), {"Content-Type": "application/json"})
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, "stored 01.json (1 raters)\nended; 1 raters have answered\n")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["01.json"]
