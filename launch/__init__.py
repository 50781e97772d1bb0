"""The commands that a person runs."""

import sys
from types import TracebackType

import trainer  # noqa: F401 - before torch is imported: it holds the garbage collector back until all is


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while a command still imports its libraries, which takes seconds, is no mistake of theirs."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped by Ctrl-C before anything was started", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _tell
