"""Settings: checked when made, unknown keys refused by name, defaults from the environment."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trbatch import config
from trbatch.config import EngineConfig, JobSpec, SamplingParams, WorkerConfig
from trbatch.errors import UsageError

CLASSES = [
    SamplingParams(),
    JobSpec(input="prompts.jsonl"),
    EngineConfig(),
    WorkerConfig(),
]


@pytest.mark.parametrize("settings", CLASSES, ids=lambda settings: type(settings).__name__)
def test_settings_survive_a_round_trip_through_json(settings: Any) -> None:
    text = json.dumps(settings.to_dict())
    assert type(settings).from_dict(json.loads(text)) == settings


@pytest.mark.parametrize("settings", CLASSES, ids=lambda settings: type(settings).__name__)
def test_settings_cannot_be_changed_afterwards(settings: Any) -> None:
    name = dataclasses.fields(settings)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings, name, "other")


def test_an_unknown_key_names_the_nearest_valid_one() -> None:
    with pytest.raises(UsageError, match="max_token'") as caught:
        SamplingParams.from_dict({"max_token": 5})
    assert caught.value.hint == "did you mean 'max_tokens'?"


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (lambda value: JobSpec(input="x", ignore_body_fields=value), "ignore_body_fields", "model"),
        (lambda value: WorkerConfig(roots=value), "roots", "/data"),
        (lambda value: SamplingParams(stop_token_ids=value), "stop_token_ids", "50256"),
    ],
)
def test_a_text_in_the_place_of_a_list_is_refused_and_not_taken_for_its_letters(
    make: Callable[[Any], Any], name: str, value: str
) -> None:
    with pytest.raises(UsageError, match=f"{name} must be a list, not '{value}'") as caught:
        make(value)
    assert caught.value.hint == f'write {name} = ["{value}"]'


def test_a_list_of_texts_holds_texts_and_a_stop_text_may_stand_alone() -> None:
    with pytest.raises(UsageError, match="must be a list of texts; 5 is none"):
        JobSpec(input="x", ignore_body_fields=("model", 5))  # type: ignore[arg-type]
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]
    assert JobSpec.from_dict({"input": "x", "ignore_body_fields": ["model"]}).ignore_body_fields


def test_an_unknown_key_like_no_other_lists_the_valid_ones() -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams.from_dict({"zzz": 5})
    assert "temperature" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", 2**31),
        ("max_tokens", 1e300),
        ("max_tokens", float("nan")),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("temperature", 1e39),  # no float32
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 2**31),
        ("min_p", 1.5),
        ("seed", -1),
        ("seed", 2**63),
        ("n", 0),
        ("n", 1025),
        ("n", 3_000_000_000),
        ("n", 1.5),
        ("stop", ("",)),
        ("stop", (1,)),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (2**31,)),
        ("ignore_eos", 1),
    ],
)
def test_a_wrong_sampling_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=name):
        SamplingParams.from_dict({name: value})


def test_whole_numbers_may_come_as_floats() -> None:
    floats = {"max_tokens": 3.0, "top_k": 5.0, "seed": 7.0, "n": 2.0, "stop_token_ids": [9.0]}
    taken = SamplingParams.from_dict(floats)
    assert taken == SamplingParams(max_tokens=3, top_k=5, seed=7, n=2, stop_token_ids=(9,))
    assert "." not in json.dumps({name: taken.to_dict()[name] for name in floats})


@pytest.mark.parametrize(
    ("temperature", "greedy"), [(0.0, True), (1e-45, True), (9e-6, True), (1e-5, False)]
)
def test_a_temperature_that_float32_cannot_divide_by_is_greedy(
    temperature: float, greedy: bool
) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (lambda: JobSpec(input=""), "input"),
        (lambda: JobSpec(input="p", chunk_size=0), "chunk_size"),
        (lambda: JobSpec(input="p", resume="maybe"), "resume"),
        (lambda: EngineConfig(dtype="int8"), "dtype"),
        (lambda: EngineConfig(page_size=0), "page_size"),
        (lambda: EngineConfig(gpu_memory_utilization=0.0), "gpu_memory_utilization"),
        (lambda: WorkerConfig(publish_s=-1.0), "publish_s"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(settings: Any, name: str) -> None:
    with pytest.raises(UsageError, match=name):
        settings()


def test_one_stop_text_is_taken_as_a_list_of_one() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]


def test_nested_settings_may_be_given_as_mappings() -> None:
    spec = JobSpec.from_dict({"input": "p.jsonl", "sampling": {"top_k": 5}})
    assert spec.sampling == SamplingParams(top_k=5)
    worker = WorkerConfig.from_dict({"engine": {"dtype": "float32"}})
    assert worker.engine.dtype == "float32"


@given(
    temperature=st.floats(0, 5),
    max_tokens=st.integers(1, 10_000),
    row=st.fixed_dictionaries({}, optional={"max_tokens": st.integers(1, 99), "n": st.just(3)}),
)
def test_a_rows_own_sampling_wins_and_the_rest_is_the_jobs(
    temperature: float, max_tokens: int, row: dict[str, int]
) -> None:
    job = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    merged = job.merged(row).to_dict()
    assert merged == job.to_dict() | row


def test_a_rows_unknown_sampling_field_is_refused() -> None:
    with pytest.raises(UsageError, match="temprature"):
        SamplingParams().merged({"temprature": 1})


def test_the_default_model_comes_from_the_environment_then_the_file_then_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRBATCH_MODEL", raising=False)
    assert config.default_model(tmp_path) == config.DEFAULT_MODEL
    (tmp_path / "trbatch.toml").write_text('model = "org/from-file"\n')
    assert config.default_model(tmp_path) == "org/from-file"
    monkeypatch.setenv("TRBATCH_MODEL", "org/from-environment")
    assert config.default_model(tmp_path) == "org/from-environment"


@pytest.mark.parametrize("text", ["model = ", 'modle = "x"\n'])
def test_a_broken_trbatch_toml_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.delenv("TRBATCH_MODEL", raising=False)
    (tmp_path / "trbatch.toml").write_text(text)
    with pytest.raises(UsageError, match=r"trbatch\.toml"):
        config.default_model(tmp_path)


def test_folders_follow_their_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRBATCH_HOME", "TRBATCH_CACHE", "TRBATCH_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert config.state_folder() == Path("/state/trbatch")
    assert config.cache_folder() == Path("/cache/trbatch")
    assert config.default_store() == Path("/state/trbatch/jobs")
    monkeypatch.setenv("TRBATCH_HOME", "/home-of-trbatch")
    monkeypatch.setenv("TRBATCH_STORE", "/store")
    assert config.state_folder() == Path("/home-of-trbatch")
    assert config.default_store() == Path("/store")
