"""Run as a program: imports SGLang once, then runs other programs, each in a fork of itself.

The import takes longer than what most of these programs do. Each finds SGLang imported and
otherwise as in a process of its own: no plugin is loaded, and what it changes ends with it.

Reads lines of JSON `{"program": source, "argv": [...], "stdin": text}` and answers each with a line
`{"returncode": int, "stdout": text, "stderr": text}`.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tempfile
import traceback
from typing import IO, Any

import sglang.launch_server
import sglang.srt.layers.moe.token_dispatcher.deepep
import sglang.srt.managers.scheduler

TIMEOUT_S = 200  # below that of a test


def main() -> None:
    """Answer until the end of the input."""
    print(json.dumps({"imported": sglang.launch_server.__name__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """How the program ended and what it wrote."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            run(request, stdout, stderr)
        _, status = os.waitpid(child, 0)
        return {
            "returncode": os.waitstatus_to_exitcode(status),
            "stdout": text_of(stdout),
            "stderr": text_of(stderr),
        }


def run(request: dict[str, Any], stdout: IO[bytes], stderr: IO[bytes]) -> None:
    """The program, with the exit status that Python gives it."""
    os.dup2(stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    signal.alarm(TIMEOUT_S)  # whose default ends the process, so that no test gets a late answer
    sys.stdin = io.StringIO(request["stdin"])
    sys.argv = request["argv"]
    code = 1
    try:
        exec(compile(request["program"], "<program>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    finally:
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def text_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


if __name__ == "__main__":
    main()
