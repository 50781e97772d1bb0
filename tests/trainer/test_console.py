"""What the console cannot show is written in another way, and a console that is gone is none."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.console import tell, write_any_text


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", rb"\u2581\udcff"), ("utf-8", b"\xe2\x96\x81\\udcff")])
def test_text_that_the_console_does_not_know_is_escaped(monkeypatch: pytest.MonkeyPatch, encoding: str, shown: bytes) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, errors="strict"))
    write_any_text()
    tell("\u2581\udcff")
    assert written.getvalue() == shown + b"\n"


def test_a_console_that_is_gone_is_not_written_to_any_more() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        tell("nobody reads this", stream)
        stream.write("nor this")  # and it closes without an error: what was left over has gone nowhere


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_the_console_ends_nothing() -> None:
    code = "from trainer.console import tell; tell('a line'); tell('another')"
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0 and done.stderr == b""
