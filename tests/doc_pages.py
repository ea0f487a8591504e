"""Pages as programs: the fenced blocks of a Markdown file, run in order as one session.

    ```console                  commands behind `$ `, continued behind `> `, then what they print
    ```console second-terminal  the same in another terminal: runs on until the page ends
    ```python                   a program; a ```text block right behind it is what it prints
    ```sh                       a script that needs what a test has not: run with stand-ins, see
                                sh_blocks.py and the table in sh_recipes.py

In what is printed, `…` stands for anything, and alone on a line for any lines. Whole numbers below
a thousand must be the same; larger ones, numbers with a point, clock times, dates and the eight
letters behind a job's name need only look alike.
A command must succeed unless the next one is `echo $?`.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(\S*)[ ]?(.*)$")
SECOND = "second-terminal"
LEFT_OUT = (".git", ".venv", "build", "dist", "demo-out", "__pycache__", ".*_cache", "*.egg-info")
KEPT = ("OMP_NUM_THREADS", "PIP_INDEX_URL", "PIP_CONFIG_FILE")
SHELL = ("bash", "--noprofile", "--norc")
MARK = "=== the command has ended with"

# What varies from run to run, and what it looks like.
VARIES = (
    (r"\d{4}-\d\d-\d\d", r"\d{4}-\d\d-\d\d"),
    (r"\d{8}-\d{6}", r"\d{8}-\d{6}"),
    (r"\d\d:\d\d(?::\d\d)?", r"\d\d:\d\d(?::\d\d)?"),
    (r"(?<=-)[0-9a-f]{8}\b", r"[0-9a-f]{8}"),
    (r"\d[\d,]*\.\d+", r"\d[\d,]*\.\d+"),
    (r"\d{1,3}(?:,\d{3})+", r"[\d,]+"),
    (r"…", r".*"),
)
VARYING = re.compile("|".join(f"({pattern})" for pattern, _ in VARIES))


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, what stands behind the language, its lines, its first line."""

    language: str
    info: str
    lines: list[str]
    line: int
    follows: bool = False  # nothing but empty lines since the block before


@dataclass(slots=True)
class Step:
    """A command and what the page says it prints."""

    command: str
    line: int
    second: bool = False
    output: list[str] = field(default_factory=list)


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    open_block: Block | None = None
    follows = False
    for number, line in enumerate(text.splitlines(), start=1):
        if open_block is None and (match := FENCE.match(line)):
            open_block = Block(match[1], match[2], [], number + 1, follows)
        elif open_block is not None and line == "```":
            yield open_block
            open_block, follows = None, True
        elif open_block is not None:
            open_block.lines.append(line)
        elif line.strip():
            follows = False
    assert open_block is None, f"the block of line {open_block.line} never ends"


def steps(text: str) -> list[Step]:
    """What a page has run, in order."""
    found: list[Step] = []
    last = ""
    for block in blocks(text):
        if block.language == "console":
            found += _commands(block)
        elif block.language == "python":
            program = "\n".join(block.lines)
            found.append(Step(f"python - <<'END_OF_BLOCK'\n{program}\nEND_OF_BLOCK", block.line))
        elif block.language == "text" and last == "python" and block.follows:
            found[-1].output = block.lines
        last = block.language
    return found


def _commands(block: Block) -> list[Step]:
    found: list[Step] = []
    for number, line in enumerate(block.lines, start=block.line):
        if line.startswith("$ "):
            found.append(Step(line[2:], number, second=block.info == SECOND))
        elif line.startswith("> ") and found and not found[-1].output:
            found[-1].command += f"\n{line[2:]}"
        else:
            assert found, f"line {number}: a console block begins with a command"
            if line.strip() or found[-1].output:
                found[-1].output.append(line)
    return found


def pattern_of(lines: list[str]) -> str:
    """What a page shows as a regular expression over what is printed, a line each."""
    parts = []
    for line in lines:
        if line.strip() == "…":
            parts.append(r"(?:[^\n]*\n)*?")
        else:
            parts.append(_line_pattern(line.rstrip()) + r"[ ]*\n")
    return "".join(parts)


def _line_pattern(line: str) -> str:
    made, end = "", 0
    for match in VARYING.finditer(line):
        made += re.escape(line[end : match.start()]) + VARIES[(match.lastindex or 1) - 1][1]
        end = match.end()
    return made + re.escape(line[end:])


def clean_clone(target: Path) -> None:
    """The repository as a new user has it, with a virtual environment that is installed already."""
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*LEFT_OUT))
    environment = target / ".venv"
    environment.mkdir()
    for part in ("bin", "lib", "lib64", "pyvenv.cfg"):
        if (found := Path(sys.prefix) / part).exists():
            (environment / part).symlink_to(found)
    (environment / "worker.stamp").touch()


class Session:
    """A shell in a clean clone with an empty home; only the cache of models is the real one.

    Args:
        home: an empty folder with a short name (a socket's path may have about 100 letters).
        cache: `TRBATCH_CACHE`, where the small model lies.
        clone: False leaves the folder empty.
    """

    def __init__(self, home: Path, cache: Path, *, clone: bool = True) -> None:
        self.folder = home / "trbatch"
        if clone:
            clean_clone(self.folder)
        self.folder.mkdir(exist_ok=True)
        self.environment = {
            "HOME": str(home),
            "PATH": f"{self.folder}/.venv/bin:{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder),
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
            "TRBATCH_CACHE": str(cache),
            "COLUMNS": "100",
            "LANG": "C.UTF-8",
            "DEMO_FLAGS": "--max-tokens=24",  # the same demo, in less time
        } | {name: os.environ[name] for name in KEPT if name in os.environ}
        self._shell = self._start()
        self._others: list[tuple[Step, subprocess.Popen[bytes]]] = []

    def run(self, step: Step, timeout: float = 240.0) -> tuple[str, int]:
        """Run a command. Returns what it printed on stdout and stderr, and its exit code."""
        assert self._shell.stdin is not None
        script = f"{step.command}\ncode=$?; echo; echo '{MARK}' $code; (exit $code)\n"
        self._shell.stdin.write(script.encode())
        self._shell.stdin.flush()
        printed = self._read(timeout, step)
        output, _, code = printed.rpartition(f"\n{MARK} ")
        return output, int(code)

    def start(self, step: Step) -> None:
        """Run a command in another terminal, until the session ends."""
        with self._log(step).open("wb") as log:
            process = subprocess.Popen(
                [*SHELL, "-c", f"exec {step.command}"],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._others.append((step, process))

    def close(self) -> list[tuple[Step, str]]:
        """End everything. Returns what the other terminals have shown."""
        shown = []
        for step, process in self._others:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            shown.append((step, self._log(step).read_text()))
        self._others = []
        self._shell.kill()
        self._shell.communicate()
        subprocess.run(
            [*SHELL, "-c", "trbatch server stop"],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            check=False,
        )
        return shown

    def _log(self, step: Step) -> Path:
        return self.folder / f".terminal-{step.line}"

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            SHELL,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def _read(self, timeout: float, step: Step) -> str:
        assert self._shell.stdout is not None
        found = b""
        end = time.monotonic() + timeout
        while not re.search(rb"\n" + MARK.encode() + rb" \d+\n$", found):
            left = end - time.monotonic()
            ready, _, _ = select.select([self._shell.stdout], [], [], max(left, 0.0))
            assert ready, f"line {step.line} takes too long: {step.command}\n{found.decode()}"
            piece = os.read(self._shell.stdout.fileno(), 1 << 16)
            assert piece, f"line {step.line} ended the shell: {step.command}\n{found.decode()}"
            found += piece
        return found.decode()


def disagreements(page: Path, session: Session) -> list[str]:
    """Run a page. Returns what it says that is not so; [] if all of it is true."""
    wrong: list[str] = []
    found = steps(page.read_text(encoding="utf-8"))
    after = [*found[1:], Step("", 0)]
    for step, following in zip(found, after, strict=True):
        if step.second:
            session.start(step)
            continue
        printed, code = session.run(step)
        where = f"{page.name}:{step.line}: $ {step.command}\n"
        if code != 0 and following.command != "echo $?":
            wrong.append(f"{where}ends with {code}:\n{printed}")
        elif re.fullmatch(pattern_of(step.output), printed) is None:
            wrong.append(f"{where}the page says:\n{_text(step.output)}it prints:\n{printed}")
    for step, shown in session.close():
        if re.match(pattern_of(step.output), shown) is None:
            where = f"{page.name}:{step.line}: $ {step.command}\n"
            wrong.append(f"{where}the page says:\n{_text(step.output)}it printed:\n{shown}")
    return wrong


def _text(lines: list[str]) -> str:
    return "".join(f"  {line}\n" for line in lines)
