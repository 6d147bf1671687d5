"""The bytes that each token stands for, as its tokenizer's decoder joins them. Knows no text that spans several tokens."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from tokenizers import Tokenizer

TokenBytes = Callable[[int], bytes]
MAX_CACHED = 2**16
"""Tokens whose bytes are kept: looking one up takes microseconds, and answers with alternatives need thousands."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes_of(tokenizer: Tokenizer) -> TokenBytes:
    """From token id to bytes: byte-level BPE (GPT-2's table), SentencePiece's marks and byte tokens, else the token's text.

    Ids that the tokenizer does not know, such as those of padded embeddings, have none.
    """
    added = {number: token.content.encode() for number, token in tokenizer.get_added_tokens_decoder().items()}
    state = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else b""
    piece_bytes = _byte_level if b'"ByteLevel"' in state else _sentencepiece if b"ByteFallback" in state else str.encode

    @functools.lru_cache(MAX_CACHED)
    def token_bytes(token: int) -> bytes:
        if token in added:
            return added[token]
        piece = tokenizer.id_to_token(token)
        return b"" if piece is None else piece_bytes(piece)

    return token_bytes


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte: printable ones stand for themselves, the others for 256 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_characters()


def _byte_level(piece: str) -> bytes:
    return b"".join(bytes([_BYTES[char]]) if char in _BYTES else char.encode() for char in piece)


def _sentencepiece(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("\u2581", " ").encode()
