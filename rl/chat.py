"""A model's chat template: the tokens around a prompt, and around a reply of the environment.

In the template, names of special tokens mean these tokens. In the texts of a task they stay text, so that no prompt can end or
begin a turn. Texts are encoded separately from the template around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.config.rl import TEXT, ChatConfig
from trainer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Frame:
    """Token ids before and after a text."""

    before: tuple[int, ...]
    behind: tuple[int, ...]
    tokenizer: Tokenizer

    @staticmethod
    def of(template: str, tokenizer: Tokenizer) -> Frame:
        """`template` has {text} once."""
        before, behind = (tuple(tokenizer.encode_marked(part)) for part in template.split(TEXT))
        return Frame(before, behind, tokenizer)

    def around(self, text: str) -> list[int]:
        return [*self.before, *self.tokenizer.encode(text), *self.behind]

    def inside(self, ids: Sequence[int]) -> str:
        """The text of what `around` made."""
        return self.tokenizer.decode(ids[len(self.before) : len(ids) - len(self.behind)])


@dataclass(frozen=True)
class Chat:
    """What stands around prompts, and around what the environment replies."""

    prompt: Frame
    reply: Frame

    @staticmethod
    def of(config: ChatConfig, tokenizer: Tokenizer) -> Chat:
        prompt = Frame.of(config.prompt, tokenizer)
        bos = (tokenizer.bos,) if config.bos else ()
        return Chat(Frame((*bos, *prompt.before), prompt.behind, tokenizer), Frame.of(config.reply, tokenizer))
