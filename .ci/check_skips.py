"""List the skipped tests of pytest's JUnit reports; with CI=true, refuse unexpected ones.

usage: check_skips.py REPORT.xml…

Exit codes: 0 fine, 1 a skip whose reason is not in `.ci/allowed-skips`, 2 usage.
"""

from __future__ import annotations

import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ALLOWED = Path(__file__).with_name("allowed-skips")


def allowed_reasons(file: Path = ALLOWED) -> list[re.Pattern[str]]:
    """The patterns of the allow-list; empty lines and comments are left out."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [re.compile(line) for line in lines if line and not line.startswith("#")]


def skipped_tests(report: Path) -> list[tuple[str, str]]:
    """(test, reason) of every test that a report calls skipped; expected failures are not."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        for skip in case.findall("skipped"):
            if skip.get("type") != "pytest.xfail":
                test = f"{case.get('classname')}::{case.get('name')}"
                found.append((test, skip.get("message") or ""))
    return found


def main(reports: list[Path]) -> int:
    """Print the skipped tests of all reports and say whether they may be skipped."""
    allowed = allowed_reasons()
    unexpected = 0
    for test, reason in (skip for report in reports for skip in skipped_tests(report)):
        known = any(pattern.fullmatch(reason) for pattern in allowed)
        unexpected += not known
        print(f"skipped ({'allowed' if known else 'NOT ALLOWED'}): {test}: {reason}")
    if unexpected and os.environ.get("CI") == "true":
        print(f"error: {unexpected} skipped without an entry in {ALLOWED.name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    sys.exit(main([Path(argument) for argument in sys.argv[1:]]))
