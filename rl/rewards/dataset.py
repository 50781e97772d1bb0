"""A task from a file: prompts and answers in JSON lines or Parquet, and the name of a verifier."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from rl.rewards.task import Prompt, is_held_out
from rl.rewards.verifiers import Option, last_match, make_verifier
from trainer.sources import encodable, json_records, missing_field

EPOCHS_KEPT = 4  # orders of the rows in memory; recycled groups ask for earlier ones
SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class Row:
    prompt: Prompt
    demonstration: str | None


class Dataset:
    """Rows of the file `path`, .jsonl or .parquet, in a new order every epoch; one prompt in eight is held out, by its hash.

    `template` is what the model reads, with {prompt} for the text in `prompt_field`. The answer is that of `answer_field`, JSON
    where it is not text; with `answer_pattern`, a regular expression, its last match there (group 1 of it if there is one).
    `demonstration_field` has completions for the warm-up; rows without one take no part in it. With `must_end`, a completion
    that was cut off is worth 0. All other options are the verifier's, see rl/rewards/verifiers.py; a function of one's own that
    takes a completion and the answer is a verifier too, by its import path.
    """

    def __init__(
        self,
        seed: int,
        path: str,
        verifier: str,
        prompt_field: str = "prompt",
        answer_field: str = "answer",
        answer_pattern: str = "",
        demonstration_field: str = "",
        template: str = "{prompt}",
        must_end: bool = True,
        **options: Option,
    ) -> None:
        if "{prompt}" not in template:
            raise UserError(f"task.options.template is {template!r}; it needs {{prompt}} where the prompt's text belongs")
        try:
            re.compile(answer_pattern)
        except re.error as error:
            raise UserError(f"task.options.answer_pattern {answer_pattern!r} is no regular expression: {error}") from error
        self.seed, self.path, self.template, self.must_end = seed, Path(path).expanduser(), template, must_end
        self.prompt_field, self.answer_field, self.demonstration_field = prompt_field, answer_field, demonstration_field
        self.answer_pattern = answer_pattern
        self.verifier = make_verifier(verifier, options)

    def prompt(self, index: int) -> Prompt:
        return self._training[self._place(index, len(self._training))].prompt

    def held_out(self, index: int) -> Prompt:
        return self._held_out[index % len(self._held_out)].prompt

    def demonstration(self, index: int) -> tuple[Prompt, str]:
        row = self._shown[self._place(index, len(self._shown))]
        assert row.demonstration is not None
        return row.prompt, row.demonstration

    def score(self, prompt: Prompt, completion: str, ended: bool) -> float | None:
        return 0.0 if self.must_end and not ended else self.verifier(completion, prompt.answer)

    # ------------------------------------------------------------ rows; read when they are asked for, so not by reward workers

    @functools.cached_property
    def _training(self) -> list[Row]:
        return self._side(held_out=False)

    @functools.cached_property
    def _held_out(self) -> list[Row]:
        return self._side(held_out=True)

    @functools.cached_property
    def _shown(self) -> list[Row]:
        rows = [row for row in self._training if row.demonstration is not None]
        if not rows:
            named = f"has none in field {self.demonstration_field!r}" if self.demonstration_field else "has no field for them"
            raise UserError(
                f"the supervised warm-up needs demonstrations, and {self.path} {named}; set "
                "task.options.demonstration_field to the field of the completions to imitate, or go without: warmup=none"
            )
        return rows

    def _side(self, held_out: bool) -> list[Row]:
        rows = [row for row in self._rows if is_held_out(row.prompt.text) == held_out]
        if not rows:
            raise UserError(
                f"{self.path} has {len(self._rows)} rows, and none is {'held out' if held_out else 'for training'}: one prompt "
                "in eight is held out, by its hash; give more rows"
            )
        return rows

    def _place(self, index: int, count: int) -> int:
        epoch, place = divmod(index, count)
        return self._order(epoch, count)[place]

    @functools.lru_cache(maxsize=EPOCHS_KEPT)  # noqa: B019  there is one task in a process
    def _order(self, epoch: int, count: int) -> list[int]:
        return random.Random(f"{self.seed}/{epoch}").sample(range(count), count)

    @functools.cached_property
    def _rows(self) -> list[Row]:
        try:
            return [self._row(where, record) for where, record in self._records()]
        except OSError as error:
            raise UserError(f"task.options.path: {self.path} cannot be read: {error.strerror or error}") from error

    def _records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self.path.suffix == ".parquet":
            return read_parquet(self.path)
        if self.path.suffix == ".jsonl":
            return json_records(self.path, f"task=dataset wants lines with {self.prompt_field!r} and {self.answer_field!r}")
        raise UserError(f"task.options.path: {self.path} is neither a .jsonl nor a .parquet file")

    def _row(self, where: str, record: dict[str, Any]) -> Row:
        for field, option in ((self.prompt_field, "prompt_field"), (self.answer_field, "answer_field")):
            if record.get(field) is None:
                names = [name for name, value in record.items() if value is not None]
                raise UserError(missing_field(where, field, names, f"task.options.{option}"))
        text = _text_only(record[self.prompt_field], self.prompt_field, where, "task.options.prompt_field")
        answer = _text(record[self.answer_field], self.answer_field, where)
        if self.answer_pattern:
            found = last_match(self.answer_pattern, answer)
            if found is None:
                raise UserError(f"{where}: task.options.answer_pattern {self.answer_pattern!r} is not in the answer {answer!r}")
            answer = found
        field = self.demonstration_field
        shown = record.get(field) if field else None
        demonstration = None if shown is None else _text_only(shown, field, where, "task.options.demonstration_field")
        return Row(Prompt(self.template.replace("{prompt}", text), answer), demonstration)


def _text(value: object, field: str, where: str) -> str:
    return encodable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str), field, where)


def _text_only(value: object, field: str, where: str, option: str) -> str:
    """A text for the model. Raises UserError where it is another value, such as the messages of a chat, whose JSON nobody
    wants a model to read or to imitate."""
    if not isinstance(value, str):
        shown = json.dumps(value, ensure_ascii=False, default=str)[:SHOWN]
        raise UserError(
            f"{where}: field {field!r} is {shown} and not text; set {option} to a field of text. Where these are messages of a "
            "chat, write their text to a field, and choose the template around it: chat=chatml"
        )
    return encodable(value, field, where)


def read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each row of a Parquet file. Raises UserError if it is none, OSError if it cannot be read."""
    import pyarrow  # here, because it is slow to import and only such a file needs it
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            row = 0
            for batch in table.iter_batches():
                for record in batch.to_pylist():
                    yield f"{path}, row {row}", record
                    row += 1
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, after row {row - 1}: a column is not UTF-8 ({error})") from error
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file that can be read: {error}") from error
