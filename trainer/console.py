"""Lines on the console, which is for people and may be gone, or not know a letter: neither ends a run."""

from __future__ import annotations

import errno
import os
import sys
from io import TextIOWrapper
from typing import TextIO

GONE = (errno.EPIPE, errno.EIO)  # nobody reads a pipe any more; a terminal was closed


def write_any_text() -> None:
    """Has this process write `\\udcff` for what the console cannot show, such as a file's name that is no text."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def tell(text: str, stream: TextIO | None = None) -> None:
    """A line on `stream`, by default the standard output, for as long as somebody can read it.

    What a full disk behind it does not take is lost: a run has the same lines in driver.log, and does not end for these.
    """
    stream = sys.stdout if stream is None else stream
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if error.errno in GONE:  # what is left in its buffer would be tried again, and change the exit code
            with open(os.devnull, "wb") as nobody:
                os.dup2(nobody.fileno(), stream.fileno())
