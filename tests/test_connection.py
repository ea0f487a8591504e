"""Redis URLs: refused in our words, never shown with a password; servers that say no."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis
from click.testing import CliRunner, Result

from trbatch import cli
from trbatch.connection import connect, mask_url, reaching
from trbatch.errors import Unreachable, UsageError


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.commands, arguments)


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("redis://host:6379/1", "redis://host:6379/1"),
        ("redis://:secret@host/1", "redis://:***@host/1"),
        ("rediss://me:secret@host:6380", "rediss://me:***@host:6380"),
        ("unix:///run/s?db=1&password=secret", "unix:///run/s?db=1&password=***"),
        ("redis://host?Password=secret&db=1", "redis://host?Password=***&db=1"),
        ("redis://host?password=sec&ret", "redis://host?password=***"),
        ("redis://host?password=sec@ret", "redis://host?password=***"),
        ("redis://me@host", "redis://me@host"),
        ("redis://:pa/ss@127.0.0.1:6399", "redis://:***@127.0.0.1:6399"),
        ("redis://:secr?et@h:1", "redis://:***@h:1"),
        ("redis://:se#cret@h:1", "redis://:***@h:1"),
        ("redis://me:se@cret@h:1", "redis://me:***@h:1"),
        ("redis://:a://b@h:1", "redis://:***@h:1"),
        ("redis://sec/ret@h:1", "redis://:***@h:1"),
        ("redis://[::1", "redis://[::1"),
        ("user:secret@h:1", "user:***@h:1"),
        ("localhost:6379", "localhost:6379"),
    ],
)
def test_passwords_are_masked(url: str, masked: str) -> None:
    assert mask_url(url) == masked


@pytest.mark.parametrize(
    "url",
    [
        "localhost:6379",
        "user:s3cret@h:1",
        "redis://[::1",
        "redis://:s3c/ret@127.0.0.1:6399",
        "redis://:s3c?ret@h:1",
        "redis://:s3c#ret@h:1",
        "redis://:12/s3cret@127.0.0.1:1",
        "redis://me:12?s3cret@127.0.0.1:1",
        "redis://127.0.0.1:6399?Password=s3cret",
        "redis://127.0.0.1:s3cret",
        "redis://127.0.0.1?socket_timeout=s3cret",
    ],
)
def test_what_is_no_url_ends_with_2_a_hint_and_no_password(home: Path, url: str) -> None:
    result = invoke("status", "--redis-url", url)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is not a Redis URL" in result.stderr
    assert "hint:" in result.stderr
    assert "s3c" not in result.stderr or "@" not in url
    assert "Traceback" not in result.stderr
    with pytest.raises(UsageError) as caught:
        connect(url)
    assert caught.value.__cause__ is None, "redis-py may quote the password"


@pytest.mark.parametrize(
    "url", ["redis://h/0?client_name=a@b", "unix:///home/me@there/s", "redis://:a%2Fb%40c@h:1/2"]
)
def test_an_at_sign_that_belongs_where_it_stands_is_no_mistake(url: str) -> None:
    connect(url).close()


def test_a_full_disk_under_the_queue_ends_with_75(full_disk: str, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "hello"}\n')
    result = invoke("submit", str(prompts), "--model", "org/m", "--redis-url", full_disk)
    assert result.exit_code == 75
    assert "MISCONF" in result.stderr
    assert "full disk" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        "MISCONF Errors writing to the AOF file: No space left on device",
        "Command # 2 (HSET a b) of pipeline caused error: MISCONF Valkey is configured to save",
        "ERR Error running script: @user_script:6: -MISCONF Errors writing",
        "NOREPLICAS Not enough good replicas to write.",
        "BUSY Valkey is busy running a script.",
    ],
)
def test_a_server_that_cannot_serve_now_is_unreachable(words: str) -> None:
    with pytest.raises(Unreachable, match="cannot be used"), reaching("redis://h"):
        raise redis.ResponseError(words)


def test_our_own_mistakes_are_not_blamed_on_the_server() -> None:
    with pytest.raises(redis.ResponseError), reaching("redis://h"):
        raise redis.ResponseError("BUSYGROUP Consumer Group name already exists")
