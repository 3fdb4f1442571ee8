"""Tokenizer and detokenizer on a byte-level tokenizer, where every character of more than one byte is split."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxn.engine.detokenizer import Detokenizer
from mxn.engine.tokenizer import Tokenizer
from mxn.errors import ModelError


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(str(byte_tokenizer_folder))


def test_the_folder_tells_what_ends_a_text(tokenizer: Tokenizer) -> None:
    assert set(tokenizer.eos_token_ids) == {256, 258}
    assert tokenizer.bos_token_id == 256
    assert tokenizer.vocab_size == 259
    assert "im_start" in (tokenizer.chat_template or "")


def test_control_tokens_in_user_text_can_be_encoded_as_plain_text(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>é"
    assert 257 in tokenizer.encode(text, add_special_tokens=False)
    plain = tokenizer.encode(text, add_special_tokens=False, allow_special=False)
    assert not set(plain) & tokenizer.special_token_ids
    assert tokenizer.decode(plain) == text


def test_bytes_of_a_token_are_exact_inside_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a é→😀", add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == "a é→😀".encode()
    assert tokenizer.token_bytes(257) == b"<|im_start|>"


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: not found"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        Tokenizer.load(str(tmp_path))


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60), cuts=st.lists(st.integers(1, 5), max_size=60))
def test_pieces_add_up_to_the_text_and_never_split_a_character(
    tokenizer: Tokenizer, text: str, cuts: list[int]
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False, allow_special=False)
    detokenizer = Detokenizer(tokenizer)
    pieces = []
    for cut in [*cuts, len(ids)]:
        pieces.append(detokenizer.push(ids[:cut]))
        ids = ids[cut:]
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" in text or not any("\N{REPLACEMENT CHARACTER}" in p for p in pieces)


def test_bytes_that_never_become_a_character_are_shown_in_the_end(tokenizer: Tokenizer) -> None:
    lead = tokenizer.encode("é", add_special_tokens=False)[0]
    detokenizer = Detokenizer(tokenizer)
    shown = "".join(detokenizer.push([lead]) for _ in range(10)) + detokenizer.flush()
    assert shown == "\N{REPLACEMENT CHARACTER}" * 10


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="abc", max_size=40),
    stop=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
)
def test_text_ends_at_the_first_stop_string(tokenizer: Tokenizer, text: str, stop: list[str], include: bool) -> None:
    detokenizer = Detokenizer(tokenizer, stop=stop, include_stop=include)
    sent = ""
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        sent += detokenizer.push([token_id])
        if detokenizer.stopped:
            break
    sent += detokenizer.flush()
    # The oracle reads character by character: the first position at which any stop string is complete.
    ends = [i for i in range(1, len(text) + 1) if any(text[:i].endswith(s) for s in stop)]
    if not ends:
        assert sent == text
        assert not detokenizer.stopped
    else:
        matched = [s for s in stop if text[: ends[0]].endswith(s)]
        starts = [ends[0] - len(s) for s in matched]
        assert detokenizer.stopped
        assert sent == (text[: ends[0]] if include else text[: min(starts)])


def test_a_stop_string_before_min_tokens_does_not_end_the_text(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, stop=["b"], min_tokens=3)
    sent = "".join(detokenizer.push([i]) for i in tokenizer.encode("abab", add_special_tokens=False))
    assert detokenizer.stopped
    assert sent == "aba"


def test_control_tokens_are_not_shown_unless_asked_for(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("ok", add_special_tokens=False), 258]
    assert Detokenizer(tokenizer).push(ids) == "ok"
    assert Detokenizer(tokenizer, skip_special_tokens=False).push(ids) == "ok<|im_end|>"
