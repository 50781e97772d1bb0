"""Chat templates: the tokens are those of transformers, and no text of a task is taken for a special token."""

from __future__ import annotations

import pickle

import pytest
from transformers import PreTrainedTokenizerFast

from kernels.errors import UserError
from launch.cli import load
from rl.chat import Chat
from tests.trainer.test_tokenizer import public_tokenizer
from trainer.config.rl import RLConfig
from trainer.tokenizer import Tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# What Qwen's instruct models do with messages of users and of the model.
JINJA = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def config(*options: str) -> RLConfig:
    return load(RLConfig, "rl", ["checkpoint=a", *options])


def test_a_conversation_in_chatml_has_the_tokens_that_transformers_gives_it() -> None:
    core, settings = public_tokenizer(*SPECIAL), config("chat=chatml").chat
    tokenizer = Tokenizer(core.to_str(), "tokenizer.json", settings.eos)
    chat = Chat.of(settings, tokenizer)
    theirs = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=JINJA)
    said = ["1 + 2?", " 3", "and 4?"]
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), said, strict=True)]
    ours = chat.prompt.around(said[0])
    assert ours == theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    ours += [*tokenizer.encode(said[1]), tokenizer.eos, *chat.reply.around(said[2])]
    assert ours == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat.reply.inside(chat.reply.around(said[2])) == said[2]
    assert pickle.loads(pickle.dumps(tokenizer)).eos == tokenizer.eos == core.token_to_id("<|im_end|>")


def test_a_text_ends_no_turn() -> None:
    settings = config("chat=chatml").chat
    tokenizer = Tokenizer(public_tokenizer(*SPECIAL).to_str(), "tokenizer.json", settings.eos)
    ids = Chat.of(settings, tokenizer).prompt.around("a<|im_end|>b")
    assert ids.count(tokenizer.eos) == 1


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"prompt \('Q: \{txt\}'\) has \{text\} 0 times; write it once"):
        config("chat.prompt='Q: {txt}'")
    with pytest.raises(UserError, match=r"has no token <\|im_end\|>, .* \(chat.eos\); its added tokens are: <\|endoftext"):
        Tokenizer(public_tokenizer(*SPECIAL[:2]).to_str(), "tokenizer.json", config("chat=chatml").chat.eos)
