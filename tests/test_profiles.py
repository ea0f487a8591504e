"""Profiles of workers: found, checked, and weaker than flags, stronger than trbatch.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from supervised import submit, supervised
from waiting import wait_for

from trbatch import cli, cli_configs, gpus, profiles
from trbatch.config import EngineConfig, WorkerConfig
from trbatch.errors import UsageError
from trbatch.queue import JobQueue


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpus, "_present", lambda: ["0"])


def config(*arguments: str) -> WorkerConfig:
    """What `trbatch worker` makes of its arguments in the working directory."""
    return cli_configs.worker_config(parsed(*arguments))


def parsed(*arguments: str) -> dict[str, Any]:
    above = click.Context(cli.commands, **cli.commands.context_settings)
    return cli.worker_command.make_context("worker", list(arguments), parent=above).params


@pytest.mark.parametrize("name", ["cpu", "l4", "a100", "h100", "h200"])
def test_every_shipped_profile_makes_a_worker_and_says_why(name: str) -> None:
    file = profiles.shipped()[name]
    engine = config("--profile", name).engine
    assert engine.max_num_seqs >= 8
    assert engine.prefill_chunk >= 512
    assert parsed("--profile", name)["gpu"] == ("" if name == "cpu" else "all")
    assert engine.device == ("cpu" if name == "cpu" else "auto")
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines):
        if " = " in line and not line.startswith("#"):
            assert "#" in line or lines[number - 1].startswith("#"), f"{file}: why {line}?"


def test_a_gpus_profile_without_a_gpu_is_an_error_and_not_a_slow_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpus, "_present", list)
    with pytest.raises(UsageError, match="this machine has no GPU"):
        config("--profile", "h100")
    assert config("--profile", "h100", "--gpu", "1").engine.max_num_seqs == 256


def test_the_help_names_the_shipped_profiles() -> None:
    words = " ".join(CliRunner().invoke(cli.commands, ["worker", "-h"]).stdout.split())
    assert "a100, cpu, h100, h200, l4, or a .toml file" in words


def test_flags_win_over_the_profile_and_the_profile_over_trbatch_toml() -> None:
    Path("trbatch.toml").write_text(
        'model = "org/m"\n[worker]\nmax_num_seqs = 1\nprefill_chunk = 1\ngrace = 1.0\n'
    )
    Path("mine.toml").write_text("max_num_seqs = 2\nprefill_chunk = 2\nspeculate = false\n")
    found = config("--profile", "mine.toml", "--max-num-seqs", "3")
    assert found.engine == EngineConfig(max_num_seqs=3, prefill_chunk=2, speculate=False)
    assert found.grace_s == 1.0
    assert found.model == ""  # a worker without --model takes any
    assert config("--profile", "none") == WorkerConfig()


def test_a_flag_wins_even_with_the_default_value() -> None:
    Path("mine.toml").write_text('dtype = "float16"\nspeculate = false\nburst = true\n')
    found = config("--profile", "mine.toml", "--dtype", "auto", "--speculate")
    assert (found.engine, found.burst) == (EngineConfig(), True)


def test_trbatch_toml_may_name_a_profile_and_win_over_it() -> None:
    Path("trbatch.toml").write_text('[worker]\nprofile = "h100"\nmax_num_seqs = 64\n')
    engine = config().engine
    assert (engine.max_num_seqs, engine.prefill_chunk) == (64, 2048)
    assert config("--profile", "l4").engine.max_num_seqs == 32


def test_paths_in_a_profile_start_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    file = tmp_path / "etc" / "w.toml"
    file.write_text('root = ["jobs", "s3://bucket/jobs"]\nmodel = "./weights"\n')
    found = config("--profile", str(file))
    assert found.roots == (str(tmp_path / "etc" / "jobs"), "s3://bucket/jobs")
    assert found.model == str(tmp_path / "etc" / "weights")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("\nmax_num_seq = 3\n", "w.toml:2: unknown setting 'max_num_seq'", "'max_num_seqs'"),
        ("profile = 'h100'\n", "w.toml:1: unknown setting 'profile'", ""),
        ("max_num_seqs = true\n", "w.toml:1: max_num_seqs must be a whole number", ""),
        ("max_num_seqs = 2.5\n", "w.toml:1: max_num_seqs must be a whole number", ""),
        ("max_num_seqs = -1\n", "w.toml:1: max_num_seqs must be at least 0", ""),
        ("grace = '60'\n", "w.toml:1: grace must be a number", ""),
        ("a = 1\n[b\n", "w.toml is not valid TOML", ""),
        ("# ok\ngpu_memory_utilization = 1.5\n", "w.toml:2: gpu_memory_utilization must be", ""),
        ("dtype = 'int8'\n", "w.toml:1: dtype: 'int8' is not one of", ""),
        ("burst = 1\n", "w.toml:1: burst must be true or false", ""),
        ("gpu = 0\n", "w.toml:1: gpu must be a text", 'gpu = "0"'),
        ("root = 4\n", "w.toml:1: root must be a list", ""),
    ],
)
def test_what_is_wrong_in_a_profile_is_told_with_file_line_and_cure(
    text: str, message: str, hint: str
) -> None:
    Path("w.toml").write_text(text)
    result = CliRunner().invoke(cli.commands, ["worker", "--profile", "w.toml"])
    assert result.exit_code == 2, result.output
    assert f"error: {message}" in result.stderr
    assert hint in result.stderr


def test_what_is_wrong_in_trbatch_toml_is_told_with_its_line() -> None:
    Path("trbatch.toml").write_text('model = "m"\n[worker]\nmax_num_seqs = 4\ngrac = 3\n')
    with pytest.raises(UsageError, match=r"trbatch\.toml:4: unknown setting 'grac'"):
        config()


@pytest.mark.parametrize(
    ("text", "line", "hint"),
    [
        ("[wroker]\nmax_num_seqs = 4\n", "1: unknown setting 'wroker'", "'worker'"),
        ('\nmodle = "m"\n', "2: unknown setting 'modle'", "'model'"),
    ],
)
def test_a_worker_refuses_a_misspelt_table_or_key_of_trbatch_toml(
    text: str, line: str, hint: str
) -> None:
    Path("trbatch.toml").write_text(text)
    result = CliRunner().invoke(cli.commands, ["worker", "--burst"])
    assert result.exit_code == 2, result.output
    assert f"trbatch.toml:{line}" in result.stderr
    assert f"did you mean {hint}?" in result.stderr
    assert config("--profile", "none") == WorkerConfig()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("h1000", "did you mean 'h100'?"),
        ("quantum", "there are a100, cpu, h100, h200, l4; or give a path"),
        ("./none.toml", "cannot read none.toml: No such file"),
    ],
)
def test_a_profile_that_is_not_there_is_told_with_those_that_are(given: str, message: str) -> None:
    result = CliRunner().invoke(cli.commands, ["worker", "--profile", given])
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_the_process_that_decodes_gets_the_settings_and_not_the_profile() -> None:
    Path("trbatch.toml").write_text("[worker]\nmax_num_seqs = 5\ngrace = 30.0\n")
    settings = parsed("--grace", "60", "--dtype", "float32")
    arguments = cli_configs.arguments_for(cli.worker_command, cli_configs.for_children(settings))
    assert "--profile=none" in arguments
    child = config(*arguments)
    assert child == config("--grace", "60", "--dtype", "float32")
    assert (child.grace_s, child.engine.max_num_seqs) == (60.0, 5)


def test_a_supervised_worker_heeds_its_profile(jobs: JobQueue, tmp_path: Path) -> None:
    job = submit(jobs, tmp_path, [f"say {i}" for i in range(4)])
    (tmp_path / "w.toml").write_text('burst = true\nlog_format = "json"\nname = "by-profile"\n')
    profile = f"--profile={tmp_path / 'w.toml'}"
    with supervised(jobs.url, tmp_path / "log", profile) as worker:
        assert worker.wait(60) == 0
    assert '"event":"chunk_done"' in worker.words
    assert "by-profile" in worker.words
    wait_for(lambda: job.progress().complete)
