"""The command that `--on-complete` names: run once, by whoever waits, when a job has ended.

It comes from the command line of this process and from nowhere else: neither a job folder nor the
queue can name one.
"""

from __future__ import annotations

import os
import subprocess

from trbatch.errors import EXIT_OK
from trbatch.job_status import JobStatus
from trbatch.logs import note

_STDERR = 2  # the file descriptor


def on_complete(command: str, status: JobStatus, exit_code: int, output: str = "") -> int:
    """Run the command by the shell, with what became of the job in its environment.

    What it prints goes to stderr: stdout is for our own data.

    Args:
        command: "" runs nothing.
        exit_code: what we would exit with.
        output: the dataset's file, if one was written.

    Returns:
        The exit code to end with: ours unless that is 0, else the command's; 128 and the signal's
        number if a signal ended it.
    """
    if not command:
        return exit_code
    progress = status.progress
    facts = {
        "JOB": status.id,
        "JOB_PATH": status.path,
        "STATUS": status.state,
        "EXIT_CODE": exit_code,
        "OUTPUT": output,
        "ROWS": progress.rows,
        "ROWS_OK": progress.rows_ok,
        "ROWS_FAILED": progress.rows_failed,
        "ROWS_CANCELLED": progress.rows_cancelled,
    }
    environment = os.environ | {f"TRBATCH_{name}": str(value) for name, value in facts.items()}
    done = subprocess.run(
        command, shell=True, env=environment, stdin=subprocess.DEVNULL, stdout=_STDERR
    )
    code = done.returncode if done.returncode >= 0 else 128 - done.returncode
    if code != EXIT_OK:
        note(f"the command of --on-complete ended with exit code {code}", exit_code=code)
    return exit_code or code
