"""Text to token ids and back, and messages to prompts: the tokenizer files of a Hugging Face directory.

Only byte-level BPE, which is what Qwen3 has: each token stands for a run of bytes, so text can be decoded token by
token (hmad.compute.detokenizer) and never needs to be decoded twice.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from hmad.compute.chat_template import ChatTemplate
from hmad.facts.errors import ModelError, RequestError

Message = Mapping[str, Any]


class Tokenizer:
    """The tokenizer and chat template of one model directory. Encoding and rendering block: call them in a thread."""

    def __init__(self, model_dir: Path) -> None:
        self._path = model_dir / "tokenizer.json"
        self._inner = load_tokenizer(self._path)
        self._special_ids = {i for i, token in self._inner.get_added_tokens_decoder().items() if token.special}
        self._bytes: dict[int, bytes] = {}
        config = read_json(model_dir / "tokenizer_config.json")
        self._special_tokens = {name: token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
        source = find_chat_template(model_dir, config)
        self._chat_template = ChatTemplate(source, str(model_dir)) if source is not None else None

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._inner.get_vocab().values()) + 1

    @property
    def eos_token_id(self) -> int | None:
        """The id of tokenizer_config.json's eos_token, if it names one."""
        token = self._special_tokens["eos_token"]
        return None if token is None else self._inner.token_to_id(token)

    def check_vocab(self, model_vocab_size: int) -> None:
        """Raise ModelError unless the model has an embedding for every token. It may have more of them (padding)."""
        if self.vocab_size > model_vocab_size:
            raise ModelError(
                f"{self._path}: token ids reach {self.vocab_size - 1}, but the model's vocab_size is {model_vocab_size}"
            )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, in which special tokens are recognised wherever they are written out."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(400, "the text holds half of a surrogate pair, which is no character") from error
        # The batch call is the one that lets other threads run meanwhile.
        (encoding,) = self._inner.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Bytes that are not UTF-8 become U+FFFD; ids without a token are skipped."""
        return self._inner.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def is_special(self, token_id: int) -> bool:
        """Whether ``skip_special_tokens`` skips it."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, possibly part of a character; none for ids without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = bytes_of(self._inner.id_to_token(token_id) or "")
        return known

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a chat, to be encoded without adding special tokens; RequestError 400 if it has none."""
        if self._chat_template is None:
            raise RequestError(400, "this model has no chat template: use /v1/completions", param="messages")
        variables = {
            **(template_kwargs or {}),
            **{name: token for name, token in self._special_tokens.items() if token is not None},
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        # Published templates ask whether these are none, not whether they are defined.
        return self._chat_template.render({"tools": None, "documents": None, **variables})

    def close(self) -> None:
        """End the process that renders the chat template."""
        if self._chat_template is not None:
            self._chat_template.close()


def load_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{path}: not a tokenizer: {error}") from error
    if not isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel):
        raise ModelError(f"{path}: its decoder is not ByteLevel; only byte-level tokenizers like Qwen3's are supported")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


def find_chat_template(model_dir: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or else tokenizer_config.json's chat_template: one template, or a list of named ones."""
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}.get("default")
    if found is not None and not isinstance(found, str):
        raise ModelError(f"{model_dir / 'tokenizer_config.json'}: chat_template is neither a text nor a list of texts")
    return found


def token_text(token: Any) -> str | None:
    """A special token of tokenizer_config.json: its text, or an object that holds it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def byte_of_char() -> dict[str, int]:
    """Byte-level BPE writes a byte as one visible character: printable Latin-1 as itself, the rest from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF_CHAR = byte_of_char()


def bytes_of(token: str) -> bytes:
    """A token's bytes. One that is not all byte characters (an added token, for example) stands for its own text."""
    if all(char in BYTE_OF_CHAR for char in token):
        return bytes(BYTE_OF_CHAR[char] for char in token)
    return token.encode()
