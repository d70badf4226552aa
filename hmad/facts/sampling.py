"""Sampling parameters of one request, the same on both nodes, and the sampled token that comes of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Neutral values (the defaults) leave the logits alone.

    Seeds are per choice and stand beside, not in here: P mints missing ones. ``stop_token_ids`` already
    holds the EOS ids unless the request said ``ignore_eos``. ``num_logprobs`` is None for none, 0 for the sampled
    token's own, k for the top k besides. ``forced_token_ids`` (teacher forcing) replaces sampling token by token.
    ``want_logits`` asks for the whole logits row of each token (float32, before penalties and temperature).
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None
    forced_token_ids: tuple[int, ...] = ()
    want_logits: bool = False

    @property
    def greedy(self) -> bool:
        """Temperature 0 means argmax."""
        return self.temperature == 0.0

    @property
    def penalized(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities of the raw model distribution (before temperature and penalties, as vLLM)."""

    logprob: float  # of the sampled token
    top: tuple[tuple[int, float], ...]  # (token id, logprob), best first


@dataclass(slots=True)
class SampledToken:
    """One token of one choice, with what was asked for about it. Not frozen, as every step makes one for each sequence:
    that would take six times as long.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None
    logits: bytes | None = None  # float32 little-endian, vocab_size values
