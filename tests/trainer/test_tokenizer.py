"""The tokenizer: exact round trips, exact byte counts, the same tokenizer from the same text, and clear errors."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from kernels.errors import UserError
from trainer.config.run import TokenizerConfig
from trainer.tokenizer import Tokenizer, train_tokenizer

TEXTS = [f"def f{i}(x):\n    return x + {i}  # naïve, 漢字, \U0001f600\n" * 3 for i in range(60)]
CONFIG = TokenizerConfig(vocab_size=280, train_mib=1)


def silent(_: str) -> None:
    return None


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, CONFIG, tmp_path_factory.mktemp("cache"), silent)


def public_tokenizer(*special: str, plain: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    """A byte-level tokenizer with other names of special tokens, as on the Hugging Face hub."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True) for name in special])
    core.add_tokens(list(plain))
    return core


def test_special_tokens_have_the_first_ids(trained: Tokenizer) -> None:
    assert (trained.bos, trained.eos, trained.pad) == (0, 1, 2)
    assert trained.vocab_size == 280


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=200))
def test_round_trip_and_bytes_are_exact_for_any_text(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert int(trained.token_bytes()[ids].sum()) == len(text.encode())
    assert trained.encode_many([text, text]) == [ids, ids]


def test_text_that_spells_a_special_token_stays_text(trained: Tokenizer) -> None:
    ids = trained.encode("a<|eos|>b<|bos|>")
    assert not {trained.bos, trained.eos, trained.pad} & set(ids)
    assert trained.decode(ids) == "a<|eos|>b<|bos|>"


def test_special_tokens_stand_for_no_text(trained: Tokenizer) -> None:
    assert trained.token_bytes()[[trained.bos, trained.eos, trained.pad]].tolist() == [0, 0, 0]
    assert trained.decode([trained.bos, *trained.encode("x = 1"), trained.eos, trained.pad]) == "x = 1"


def test_digits_are_tokens_of_their_own(trained: Tokenizer) -> None:
    assert len(trained.encode("1234567890")) == 10


def test_the_same_text_gives_the_same_tokenizer_in_another_cache(tmp_path: Path, trained: Tokenizer) -> None:
    assert train_tokenizer(iter(TEXTS), CONFIG, tmp_path, silent).layout == trained.layout


def test_a_trained_tokenizer_is_read_from_the_cache(tmp_path: Path) -> None:
    said: list[str] = []
    first = train_tokenizer(TEXTS, CONFIG, tmp_path, said.append)
    assert said == ["training the tokenizer on 0.0 MiB of text"]
    assert train_tokenizer(TEXTS, CONFIG, tmp_path, said.append).layout == first.layout
    assert len(said) == 1
    train_tokenizer(TEXTS, TokenizerConfig(vocab_size=270, train_mib=1), tmp_path, said.append)
    train_tokenizer(TEXTS[1:], CONFIG, tmp_path, said.append)
    assert len(said) == 3
    names = [path.name for path in (tmp_path / "tokenizers").iterdir()]
    assert len(names) == 3 and not [name for name in names if name.startswith(".")]


def test_training_reads_no_further_than_train_mib(tmp_path: Path) -> None:
    read = 0

    def endless() -> object:
        nonlocal read
        while True:
            read += 1
            yield "é" * 1000

    train_tokenizer(endless(), TokenizerConfig(vocab_size=260, train_mib=0.01), tmp_path, silent)  # type: ignore[arg-type]
    assert read == 6  # 10485 bytes of 2000 each


def test_a_small_text_gives_a_smaller_vocabulary(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["abc"], TokenizerConfig(vocab_size=5000, train_mib=1), tmp_path, silent)
    assert tokenizer.vocab_size == 259
    assert len(tokenizer.token_bytes()) == 259


def test_save_load_and_pickle_keep_everything(tmp_path: Path, trained: Tokenizer) -> None:
    trained.save(tmp_path / "new" / "tokenizer.json")
    text = "héllo <|bos|> 12"
    for copy in (Tokenizer.load(tmp_path / "new" / "tokenizer.json"), pickle.loads(pickle.dumps(trained))):
        assert copy.layout == trained.layout
        assert copy.encode(text) == trained.encode(text)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokenizer.json"]


def test_a_public_tokenizer_with_one_special_token_for_all(tmp_path: Path) -> None:
    public_tokenizer("<|endoftext|>", plain=("<think>",)).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.bos == tokenizer.eos == tokenizer.pad == 256
    assert tokenizer.vocab_size == 258
    text = "é<think>x<|endoftext|>"
    ids = tokenizer.encode(text)
    assert 257 in ids and 256 not in ids
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())


def test_own_names_are_preferred_to_shared_ones(tmp_path: Path) -> None:
    public_tokenizer("<|endoftext|>", "<|begin_of_text|>", "</s>", "[PAD]").save(str(tmp_path / "t.json"))
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (257, 258, 259)


def test_padding_and_truncation_of_a_file_are_switched_off(tmp_path: Path) -> None:
    core = public_tokenizer("<|endoftext|>")
    core.enable_padding(length=50)
    core.enable_truncation(max_length=4)
    core.save(str(tmp_path / "t.json"))
    assert len(Tokenizer.load(tmp_path / "t.json").encode("abcdefgh")) == 8


def test_missing_special_tokens_are_named(tmp_path: Path) -> None:
    public_tokenizer("<s>", "<tool>").save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=r"lacks these special tokens: eos \(.*; pad \(one of .*added tokens are: <s>, <tool>"):
        Tokenizer.load(tmp_path / "t.json")


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path) -> None:
    core = public_tokenizer("<|endoftext|>")
    core.decoder = decoders.Metaspace()
    core.save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match="not byte-level: its decoder is Metaspace"):
        Tokenizer.load(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello", "is not a tokenizer: it is not JSON"),
        (b"[1]", "has no 'model'"),
        (b'{"model": 3}', "has no 'model'"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (
            b'{"model": {"type": "Martian"}, "decoder": {"type": "ByteLevel"}}',
            "cannot be read by tokenizers .*; update",
        ),
        (
            # its Rust panics: 'b' is shorter than the prefix
            b'{"model": {"type": "BPE", "continuing_subword_prefix": "##", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": '
            b'["a b"]}, "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}}',
            "cannot be read by tokenizers .*: slice index starts at .*; update",
        ),
    ],
)
def test_a_file_that_is_no_tokenizer_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.json does not exist .*tokenizer.file=null"):
        Tokenizer.load(tmp_path / "nothing.json")
    with pytest.raises(UserError, match=r"is a folder; name the tokenizer.json itself"):
        Tokenizer.load(tmp_path)
