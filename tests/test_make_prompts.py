"""The script that makes any number of different prompts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from trbatch.config import SamplingParams
from trbatch.engine.bench_prompts import read_prompts
from trbatch.prompts import read_rows

SCRIPT = Path(__file__).parent.parent / "jobs" / "make_prompts.py"


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_prompts", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(script: Any, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert script.main(list(arguments)) == 0
    return capsys.readouterr().out.splitlines()


def test_five_thousand_prompts_differ_in_more_than_their_number(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in made(script, capsys, "5000")]
    texts = [row["messages"][0]["content"] for row in rows]
    assert len({row["id"] for row in rows}) == len(set(texts)) == 5000
    assert len({text.replace(str(10_000 + i), "") for i, text in enumerate(texts)}) == 5000
    assert {row["category"] for row in rows} == set(script.TEMPLATES)
    assert not any("{" in text for text in texts)


def test_the_same_number_and_seed_give_the_same_file_and_more_only_add_to_it(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    few = made(script, capsys, "60")
    assert made(script, capsys, "60") == few
    assert made(script, capsys, "90")[:60] == few
    assert made(script, capsys, "60", "--seed", "1") != few
    assert json.loads(few[1]) == {
        "id": "extraction-000001",
        "messages": [
            {
                "role": "user",
                "content": "Extract name, city, product, colour, quantity and order number as "
                "JSON.\n\nGrace Murphy rang from Maribor on 1 March: please send 55 more white "
                "kitchen scales, as in order 10001.",
            }
        ],
        "category": "extraction",
    }


def test_they_are_good_rows_for_a_job_and_for_a_benchmark(
    script: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(made(script, capsys, "48")) + "\n", encoding="utf-8")
    rows = list(read_rows(file, sampling=SamplingParams()))
    assert [row.error for row in rows] == [None] * 48
    prompts = read_prompts(file)
    assert len({prompt.text for prompt in prompts}) == 48
    assert len({prompt.category for prompt in prompts}) == len(script.TEMPLATES)


@pytest.mark.parametrize("count", ["0", "-3", "many"])
def test_a_count_that_means_nothing_is_refused(
    script: Any, capsys: pytest.CaptureFixture[str], count: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(["--", count])
    assert caught.value.code == 2
    assert "count" in capsys.readouterr().err
