"""The `sh` blocks of the pages as scripts: which there are, and how a test runs one.

A block speaks of what a reader has and a test has not: a GPU, a queue on another host, a bucket. A
`Recipe` says what stands in for it, word by word, and what is there before; all else runs as it is.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from doc_pages import ROOT, Session, Step, blocks

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # the guides
GPU = Path("/dev/nvidiactl").exists()
ON_A_CPU = {"--gpu 0": "--device cpu", "--gpu all": "--device cpu"}

# What runs beside the block is asked to end when the block has, and must end well. The queue's
# server is ended from here, where the environment is that has it.
_BEGIN = """\
set -euo pipefail
beside=()
end() {
    code=$?
    kill "${beside[@]}" 2>/dev/null || true
    trbatch server stop >/dev/null 2>&1 || true
    exit $code
}
trap end EXIT
"""
_END = """
for process in "${beside[@]}"; do kill -TERM $process; wait $process || [ $? -eq 143 ]; done
beside=()
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the blocks of one script are run.

    Args:
        page: below the repository's root.
        keys: how the first command of each block begins; the blocks are one script, in this order.
        instead: words of the blocks and what stands in for them; `{name}` is a place of the test.
        without_gpu: the same, only where there is no GPU.
        beside: how a line begins that runs on in a terminal of its own, as a worker does.
        before: lines of shell in front of the blocks; what a reader has done already.
        after: lines behind them; what a reader does next.
        elsewhere: the test file that runs the blocks; "": `test_sh_blocks.py`.
    """

    page: str
    keys: tuple[str, ...]
    instead: Mapping[str, str] = field(default_factory=dict)
    without_gpu: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    before: str = ""
    after: str = ""
    elsewhere: str = ""

    @property
    def name(self) -> str:
        """What the test is called."""
        return f"{self.page}: {self.keys[0]}"


def all_blocks() -> Iterator[tuple[str, str]]:
    """(page, script) of every `sh` block of the README and the guides."""
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.language == "sh":
                yield str(page.relative_to(ROOT)), "\n".join(block.lines)


def first_command(script: str) -> str:
    """The first line of a script that is no comment."""
    return next(line for line in script.splitlines() if not line.startswith("#"))


def found(page: str, key: str) -> str:
    """The script of the block of a page whose first command begins like this."""
    scripts = [text for name, text in all_blocks() if name == page]
    (script,) = (text for text in scripts if first_command(text).startswith(key))
    return script


def replaced(script: str, instead: Mapping[str, str], places: Mapping[str, object]) -> str:
    """A script with stand-ins; each of the words must be in it."""
    for word, other in instead.items():
        assert word in script, f"{word!r} is not on the page any more"
        script = script.replace(word, other.format_map(places))
    return script


def script_of(recipe: Recipe, places: Mapping[str, object]) -> str:
    """All that is run for a recipe."""
    body = "\n".join(found(recipe.page, key) for key in recipe.keys)
    body = replaced(body, recipe.instead, places)
    if not GPU:
        body = replaced(body, recipe.without_gpu, places)
    whole = f"{recipe.before.format_map(places)}\n{body}\n{recipe.after.format_map(places)}"
    lines = whole.splitlines()
    for number, line in enumerate(lines):
        if recipe.beside and line.startswith(recipe.beside):
            command = line.partition(" #")[0].strip()
            lines[number] = f"{command} >terminal-{number} 2>&1 & beside+=($!)"
    return "\n".join((_BEGIN, *lines, _END))


def run(
    recipe: Recipe,
    session: Session,
    places: Mapping[str, object],
    environment: Mapping[str, str],
    timeout: float = 600.0,
) -> str:
    """Run a recipe in a session. Returns what it printed; it must succeed."""
    exports = "".join(f"export {name}={shlex.quote(v)}\n" for name, v in environment.items())
    script = script_of(recipe, places)
    printed, code = session.run(Step(f"(\n{exports}{script}\n)", 0), timeout)
    terminals = [path.read_text() for path in sorted(session.folder.glob("terminal-*"))]
    assert code == 0, "\n".join((script, f"ends with {code}:", printed, *terminals))
    return printed
