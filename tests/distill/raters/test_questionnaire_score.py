"""Scores of made-up raters, whose preferences and means are known; what is skipped is told."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from studies import answers, make_study, plain_answers, study_of, write_answers

from distill.__main__ import main
from distill.raters.answers import Collected, parse
from distill.raters.items import GROUPS, ITEMS, QUESTIONS
from distill.raters.results import results_of
from distill.raters.statistics import Bootstrap
from distill.raters.study import Study, read_key

MODELS = ("ours", "theirs", "other")
SHARES = dict(zip(MODELS, (0.6, 0.3, 0.1), strict=True))
MEANS = dict(zip(MODELS, (4.0, 3.0, 2.0), strict=True))


def results(study: Study, given: list[dict[str, Any]], draws: int = 500) -> dict[str, Any]:
    found = [parse(json.dumps(one), study, "test") for one in given]
    return results_of(study, Collected(found, {}), draws, 0)


def drawn(study: Study, seed: int, raters: int) -> list[dict[str, Any]]:
    """Raters whose choices have SHARES, and whose scores have MEANS, on average."""
    numbers = np.random.default_rng(seed)

    def scores(rater: int, prompt: int, model: str) -> list[int]:
        return [int(score) for score in MEANS[model] + numbers.integers(-1, 2, len(ITEMS))]

    def best(rater: int, prompt: int, question: str) -> str:
        return str(numbers.choice(MODELS, p=list(SHARES.values())))

    return [answers(study, rater, scores, best) for rater in range(raters)]


def test_known_shares_and_means_lie_in_the_intervals() -> None:
    """Of 95 % intervals, nearly all: the bootstrap over raters and prompts is on the wide side."""
    study, inside = study_of(10, MODELS), []
    for seed in range(12):
        found = results(study, drawn(study, seed, 12), draws=300)
        for model in MODELS:
            cells = [(found["preference"][question][model], SHARES[model]) for question in QUESTIONS]
            cells += [(found["items"][item.name][model], MEANS[model]) for item in ITEMS]
            cells += [(found["mean"][model], MEANS[model])]
            inside += [low <= true <= high for (_, low, high), true in cells]
            assert all(low <= mean <= high for (mean, low, high), _ in cells)
    assert 0.94 < np.mean(inside) <= 1


def test_an_interval_has_the_width_of_the_theory() -> None:
    """Where only raters differ, a mean's standard error is the raters' deviation by the root of their number."""
    numbers = np.random.default_rng(0)
    values = np.repeat(numbers.normal(3, 1, (50, 1)), 20, axis=1)[..., None]
    found = Bootstrap(50, 20, 4000, 0).estimate(values)
    expected = 2 * 1.96 * values[:, 0, 0].std() / np.sqrt(50)
    assert float((found.high - found.low)[0]) == pytest.approx(expected, rel=0.05)
    turned = Bootstrap(20, 50, 4000, 0).estimate(values.swapaxes(0, 1))
    assert float((turned.high - turned.low)[0]) == pytest.approx(expected, rel=0.05)


def test_what_nobody_answered_has_no_numbers() -> None:
    """And takes none from its neighbours, although some draws know nothing of those either."""
    values = np.full((3, 2, 2), np.nan)
    values[0, 0, 0] = 4
    found = Bootstrap(3, 2, 200, 0).estimate(values)
    assert (found.mean[0], found.low[0], found.high[0]) == (4, 4, 4)
    assert np.isnan([found.mean[1], found.low[1], found.high[1]]).all()


def test_fixed_answers_have_exact_numbers() -> None:
    """Scores by group and model; the first rater of four prefers the second model."""
    study = study_of(3, ("ours", "theirs"))
    level = {"ours": 5, "theirs": 2}

    def scores(rater: int, prompt: int, model: str) -> list[int]:
        return [max(1, level[model] - number) for number, group in enumerate(GROUPS) for _ in group.items]

    found = results(study, [answers(study, r, scores, lambda r, p, q: "ours" if r else "theirs") for r in range(4)])
    assert found["preference"]["overall"]["ours"][0] == 0.75
    assert found["preference"]["text"]["theirs"][0] == 0.25
    assert [found["groups"][group.name]["ours"] for group in GROUPS] == [[5, 5, 5], [4, 4, 4], [3, 3, 3]]
    assert found["mean"]["ours"][0] == pytest.approx((6 * 5 + 5 * 4 + 4 * 3) / 15)
    assert found["differences"]["share"]["theirs"][0] == 0.5
    assert found["differences"]["score"]["theirs"][0] == pytest.approx(62 / 15 - 21 / 15)
    assert set(found["agreement"]["items"].values()) == {1.0}
    assert found["lengths"] == {"0-5 s": found["preference"]["overall"]}
    assert sum(row[0] for row in found["places"].values()) == 1


def test_agreement_of_random_raters_is_near_zero() -> None:
    study, numbers = study_of(30, MODELS), np.random.default_rng(0)

    def scores(*_: Any) -> list[int]:
        return [int(score) for score in numbers.integers(1, 6, len(ITEMS))]

    found = results(study, [answers(study, r, scores, lambda *_: str(numbers.choice(MODELS))) for r in range(12)])
    values = [*found["agreement"]["items"].values(), *found["agreement"]["preference"].values()]
    assert max(map(abs, values)) < 0.06


def test_unknown_agreement_is_null() -> None:
    study = study_of(2, MODELS)
    one = results(study, [plain_answers(study)])
    assert set(one["agreement"]["preference"].values()) == {None}


def test_lengths_are_those_of_their_prompts() -> None:
    study = study_of(4, ("ours", "theirs"))
    rows = tuple(replace(row, seconds=s) for row, s in zip(study.prompts, (5, 5.1, 9, 18), strict=True))
    study = replace(study, prompts=rows)
    given = [
        answers(study, r, lambda *_: [3] * 15, lambda r, p, q: "ours" if p in (0, 1) else "theirs") for r in (1, 2)
    ]
    shares = {name: rows["ours"][0] for name, rows in results(study, given)["lengths"].items()}
    assert shares == {"0-5 s": 1, "5-10 s": 0.5, "over 10 s": 0}


@pytest.fixture(scope="module")
def folder_of_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("scored"))


@pytest.fixture
def unplotted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take a second."""
    monkeypatch.setattr("distill.raters.score.plot", lambda *_: None)


def score(folder_of_study: Path, folder: Path, *words: str) -> int:
    out = ["--answers", str(folder / "answers"), "--out", str(folder / "results")]
    return main(["questionnaire", "score", "--study", str(folder_of_study), "--draws", "50", *out, *words])


@pytest.mark.slow
def test_tables_and_plots(folder_of_study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    study = read_key(folder_of_study)
    write_answers(tmp_path / "answers", plain_answers(study, 1), plain_answers(study, 2))
    assert score(folder_of_study, tmp_path) == 0
    text = (tmp_path / "results" / "scores.md").read_text()
    assert text in capsys.readouterr().out
    assert "| Overall | 100.0 (100.0 to 100.0) | 0.0 (0.0 to 0.0) |  |" in text.splitlines()
    assert all(f"| {item.title} | 3.00 (3.00 to 3.00) | 3.00 (3.00 to 3.00) |" in text for item in ITEMS)
    assert json.loads((tmp_path / "results" / "scores.json").read_text())["raters"] == 2
    for name in ("preference.png", "radar.png"):
        assert (tmp_path / "results" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("unplotted")
def test_the_same_seed_gives_the_same_numbers(folder_of_study: Path, tmp_path: Path) -> None:
    study = read_key(folder_of_study)
    numbers = np.random.default_rng(0)
    given = [answers(study, r, lambda *_: [3] * 15, lambda *_: str(numbers.choice(study.models))) for r in range(5)]
    write_answers(tmp_path / "answers", *given)
    texts = []
    for seed in ("1", "1", "2"):
        assert score(folder_of_study, tmp_path, "--seed", seed) == 0
        texts.append((tmp_path / "results" / "scores.json").read_text())
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.usefixtures("unplotted")
def test_what_does_not_count_is_told(folder_of_study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, folder = read_key(folder_of_study), tmp_path / "answers"
    partial, foreign, unknown = (plain_answers(study, number) for number in (2, 3, 4))
    partial["pages"].pop("2")
    foreign["study"] = "another"
    unknown["pages"]["1"]["shown"][0] = "none"
    write_answers(folder, plain_answers(study, 1), partial, foreign, unknown)
    (folder / "copy.json").write_text(json.dumps(plain_answers(study, 1)))
    (folder / "empty.json").write_text("")
    (folder / "notes.txt").write_text("no answers")
    assert score(folder_of_study, tmp_path) == 0
    found = json.loads((tmp_path / "results" / "scores.json").read_text())
    assert (found["raters"], found["finished"]) == (1, 1)
    whys = {
        "02.json": "got no answers to 1 of 3 prompts",
        "03.json": "got study 'another'",
        "04.json": "expected the videos of the prompt",
        "copy.json": "got the same answers as 01.json",
        "empty.json": "got no JSON",
    }
    assert found["skipped"].keys() == whys.keys()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(whys)
    text = (tmp_path / "results" / "scores.md").read_text()
    for (file, why), line in zip(whys.items(), said, strict=True):
        assert line.startswith(f"skipped {file}: ")
        assert why in line
        assert why in found["skipped"][file]
        assert f"| {file} | " in text
    assert score(folder_of_study, tmp_path, "--incomplete") == 0
    found = json.loads((tmp_path / "results" / "scores.json").read_text())
    assert (found["raters"], found["finished"], "02.json" in found["skipped"]) == (2, 1, False)


@pytest.mark.usefixtures("unplotted")
def test_incomplete_raters_weigh_as_much_as_they_answered(folder_of_study: Path, tmp_path: Path) -> None:
    study = read_key(folder_of_study)
    first, second = study.models
    full = answers(study, 1, lambda *_: [5] * 15, lambda *_: first)
    part = answers(study, 2, lambda *_: [1] * 15, lambda *_: second)
    part["pages"] = {"3": part["pages"]["3"]}
    write_answers(tmp_path / "answers", full, part)
    assert score(folder_of_study, tmp_path, "--incomplete") == 0
    found = json.loads((tmp_path / "results" / "scores.json").read_text())
    assert found["preference"]["overall"][first][0] == 0.75
    assert found["mean"][first][0] == pytest.approx((3 * 5 + 1) / 4)


def test_bad_input_of_score(folder_of_study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, folder = read_key(folder_of_study), tmp_path / "answers"

    def refused(message: str, *words: str) -> None:
        assert score(folder_of_study, tmp_path, *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line
        assert not (tmp_path / "results").exists()

    refused("answers: got ", "--seed", "1")
    write_answers(folder)
    refused("that count, expected at least one rater")
    write_answers(folder, plain_answers(study, 1))
    (folder / "second.json").write_text(json.dumps(answers(study, 1, lambda *_: [4] * 15, lambda *_: study.models[0])))
    refused("got different ones of rater '01' in 01.json and second.json")
    (folder / "second.json").write_text("{}")
    refused("second.json: got no answers, expected a JSON object of format 1", "--strict")
    refused("draws: got 0, expected 1 to", "--draws", "0")
    refused("seed: got -1, expected 0 or more", "--seed", "-1")
    refused("study: got no ", "--study", str(tmp_path))
