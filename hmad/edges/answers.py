"""Pieces of text as OpenAI's objects: whole, or as the chunks of a stream."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from hmad.edges.completions import Piece, Run
from hmad.edges.openai_schema import CompletionRequest, chat_logprobs, completion_logprobs, logits_rows


class Answer(ABC):
    """What both routes share; a subclass says how a choice looks."""

    id_prefix: ClassVar[str]
    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, run: Run) -> None:
        self.run = run
        self.job = run.job
        self.request = run.job.request
        self._head = {
            "id": f"{self.id_prefix}-{run.generations[0].request_id}",
            "created": int(time.time()),
            "model": run.job.model_name,
        }
        self._opened: set[int] = set()

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that begins a choice, if this kind has one."""

    @abstractmethod
    def delta(self, piece: Piece) -> dict[str, Any]:
        """What a piece adds to its choice; nothing is ``finished`` by it."""

    @abstractmethod
    def finish(self, piece: Piece) -> dict[str, Any]:
        """The chunk that ends a choice."""

    @abstractmethod
    def choice(self, piece: Piece) -> dict[str, Any]:
        """A whole choice."""

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer without streaming: one piece per choice."""
        choices = [self.choice(piece) for piece in sorted(pieces, key=lambda piece: piece.index)]
        return {**self._head, "object": self.whole_kind, "choices": choices, "usage": self.run.usage()}

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The chunks of one event: the choice's opening, its text, its end, where there are any."""
        if piece.index not in self._opened:
            self._opened.add(piece.index)
            yield from self._chunk(self.opening(piece.index))
        if piece.text or self._wants_every_token:
            yield from self._chunk(self.delta(piece))
        if piece.finish_reason:
            yield from self._chunk(self.finish(piece))

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, where the client asked for it."""
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": self.run.usage()}

    def _chunk(self, choice: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        if choice is not None:
            usage = {"usage": None} if self.request.include_usage else {}
            yield {**self._head, "object": self.chunk_kind, "choices": [choice], **usage}

    @property
    def _wants_every_token(self) -> bool:
        """Whether a token matters even when its text is not certain yet."""
        request = self.request
        return bool(request.return_token_ids or request.return_logits) or request.num_logprobs is not None

    def _extras(self, piece: Piece) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if self.request.return_token_ids:
            extras["token_ids"] = [token.token_id for token in piece.tokens]
        if self.request.return_logits:
            extras["logits"] = logits_rows(piece.tokens)
        return extras

    def _prompt_token_ids(self, index: int) -> dict[str, Any]:
        wanted = self.request.return_token_ids
        return {"prompt_token_ids": list(self.job.prompt_of(index).token_ids)} if wanted else {}


class CompletionAnswer(Answer):
    """/v1/completions: text, after the prompt where ``echo`` asks for it."""

    id_prefix = "cmpl"
    whole_kind = chunk_kind = "text_completion"

    def opening(self, index: int) -> dict[str, Any] | None:
        echo, prompt = self.job.prompt_of(index).echo, self._prompt_token_ids(index)
        return _text_choice(index, echo) | prompt if echo or prompt else None

    def delta(self, piece: Piece) -> dict[str, Any]:
        return _text_choice(piece.index, piece.text, self._logprobs(piece)) | self._extras(piece)

    def finish(self, piece: Piece) -> dict[str, Any]:
        return _text_choice(piece.index, "", finish_reason=piece.finish_reason)

    def choice(self, piece: Piece) -> dict[str, Any]:
        text = self.job.prompt_of(piece.index).echo + piece.text
        base = _text_choice(piece.index, text, self._logprobs(piece), piece.finish_reason)
        return base | self._extras(piece) | self._prompt_token_ids(piece.index)

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self.request.num_logprobs is None:
            return None
        return completion_logprobs(piece.tokens, piece.offsets, self.job.model.tokenizer)


class ChatAnswer(Answer):
    """/v1/chat/completions: an assistant's message."""

    id_prefix = "chatcmpl"
    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return super().whole(pieces) | self._prompt_token_ids(0)

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        first = not self._opened
        for chunk in super().chunks(piece):
            yield chunk | self._prompt_token_ids(0) if first else chunk
            first = False

    def opening(self, index: int) -> dict[str, Any]:
        return _chat_choice(index, {"delta": {"role": "assistant", "content": ""}})

    def delta(self, piece: Piece) -> dict[str, Any]:
        delta = {"delta": {"content": piece.text}}
        return _chat_choice(piece.index, delta, self._logprobs(piece)) | self._extras(piece)

    def finish(self, piece: Piece) -> dict[str, Any]:
        return _chat_choice(piece.index, {"delta": {}}, finish_reason=piece.finish_reason)

    def choice(self, piece: Piece) -> dict[str, Any]:
        message = {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
        return _chat_choice(piece.index, message, self._logprobs(piece), piece.finish_reason) | self._extras(piece)

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        wanted = self.request.num_logprobs is not None
        return chat_logprobs(piece.tokens, self.job.model.tokenizer) if wanted else None


def _text_choice(
    index: int, text: str, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _chat_choice(
    index: int, body: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, **body, "logprobs": logprobs, "finish_reason": finish_reason}


def answer_for(run: Run) -> Answer:
    """The answer in the dialect of the route that the request came by."""
    return CompletionAnswer(run) if isinstance(run.job.request, CompletionRequest) else ChatAnswer(run)
