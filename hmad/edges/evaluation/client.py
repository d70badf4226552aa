"""Asks a prefill node by REST: greedy answers, and logits along given tokens."""

import base64
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from hmad.edges.evaluation.nodes import EvaluationError
from hmad.edges.evaluation.questions import Item
from hmad.edges.evaluation.statistics import Logits

PATIENCE_S = 1800.0  # a large model on few cores; a dead node is found otherwise
GREEDY = {"temperature": 0, "repetition_penalty": 1}  # whatever the model's generation_config.json says


@dataclass(frozen=True)
class Answer:
    token_ids: list[int]
    text: str


class Client:
    """One prefill node."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def answer(self, item: Item) -> Answer:
        """What the model writes by itself."""
        fields = {"max_tokens": item.question.max_tokens, "return_token_ids": True}
        choice = await self._complete(item, fields)
        return Answer(choice["token_ids"], choice["text"])

    async def logits_along(self, item: Item, token_ids: Sequence[int]) -> Logits:
        """The logits before each of these tokens, each fed after the ones before it: [tokens, vocab]."""
        fields = {
            "max_tokens": len(token_ids),
            "forced_token_ids": list(token_ids),
            "ignore_eos": True,
            "return_logits": True,
        }
        choice = await self._complete(item, fields)
        rows = [np.frombuffer(base64.b64decode(row), dtype="<f4") for row in choice["logits"]]
        logits: Logits = np.stack(rows)
        return logits

    async def _complete(self, item: Item, fields: dict[str, Any]) -> dict[str, Any]:
        body = {"prompt": item.prompt_token_ids} | GREEDY | fields
        async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
            answer = await response.json()
        if response.status != 200:
            message = answer["error"]["message"]
            raise EvaluationError(f"{item.task}, line {item.line}: the node answered {response.status}: {message}")
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    async def counter(self, name: str) -> int:
        """The value of a counter of the node, labels summed."""
        async with self._session.get(f"{self._url}/metrics") as response:
            text = await response.text()
        return round(sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Client]:
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        try:
            yield Client(session, url)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EvaluationError(f"the prefill node at {url}: {error or type(error).__name__}") from error
