"""The CUDA devices beside the CPU's, whose numerics they share: skipped where there is no GPU."""

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from daemons import DecodeDaemon, PrefillDaemon, needs_gpu, running
from decoders import PATIENCE_S, Decoder, logits_of, poison_token, prompt_of, relative_error
from landings import lands_as_on_the_host
from openai import OpenAI
from prefilled import Prefilled, sequence_of

from hmad.compute.codecs import decode
from hmad.compute.cpu import CpuDecode, CpuPrefill
from hmad.compute.cuda_buffers import fetched
from hmad.compute.device import PrefillChunk
from hmad.compute.loading import load_model
from hmad.compute.staging import StagingPool
from hmad.facts.errors import NonFiniteKVError
from hmad.facts.formats import FORMATS, KVFormat, KVGeometry
from hmad.facts.sampling import SamplingParams

pytestmark = list(needs_gpu)

CHECKPOINT = Path(__file__).parent.parent / "scripts" / "checkpoint"
GEOMETRY = KVGeometry(6, 2, 64)
PAGE_BYTES = 3 * GEOMETRY.slot_bytes
NUM_SLOTS = 200
PRECISIONS = ("fp32", "bf16", "int8", "fp8", "bfp8")
EXACT = 1e-4  # relative error of fp32 on one device against the other
CLOSE = 0.02  # of bf16 in one pass and in chunks
AS_GOOD = 1.25  # how much farther from fp32 the GPU may be than the CPU in the same precision


def prefiller(device: str, precision: str, pages: int = 64) -> Prefilled:
    model = load_model(CHECKPOINT, precision, device=device)
    staging = StagingPool(pages * PAGE_BYTES, PAGE_BYTES, pinned=device != "cpu")
    if device == "cpu":
        return Prefilled(CpuPrefill(model, GEOMETRY, staging), staging)
    from hmad.compute.cuda_prefill import CudaPrefill

    return Prefilled(CudaPrefill(model, GEOMETRY, staging), staging)


def prefilled_values(device: str, precision: str, kv: KVFormat) -> list[torch.Tensor]:
    """K and V of every layer of three prompts in one batch, each as [tokens, heads, head_dim], then their logits."""
    prefilled = prefiller(device, precision)
    sequences = [sequence_of(prompt_of(n, n), kv) for n in (1, 33, 200)]
    tokens = prefilled.run(*(PrefillChunk(s, s.num_remaining) for s in sequences))
    values: list[torch.Tensor] = []
    for layer_id in range(GEOMETRY.num_layers):
        for sequence in sequences:
            raw = torch.from_numpy(prefilled.raw(sequence, layer_id))
            values += decode(kv, raw, len(sequence.prompt_token_ids), 2, 64)
    assert [layer_id for clock in prefilled.clocks for layer_id in clock.layers] == list(range(GEOMETRY.num_layers))
    assert all(c.started_s <= c.kv_ready_s for c in prefilled.clocks)
    assert prefilled.staging.free_pages == 64
    return values + [logits_of(tokens[s][0]) for s in sequences]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_packed_batch_is_as_exact_as_the_cpu_s(precision: str) -> None:
    """Both devices round alike, but add up in other orders: what that does to a low precision is chance, how far it
    leads from fp32 is not.
    """
    kv = FORMATS[{"fp8": "fp8_e4m3"}.get(precision, precision)]
    exact = prefilled_values("cpu", "fp32", FORMATS["fp32"])
    ours, theirs = (prefilled_values(device, precision, kv) for device in ("cuda", "cpu"))
    if precision == "fp32":
        assert max(relative_error(a, b) for a, b in zip(ours, exact, strict=True)) < EXACT
        return
    errors = [
        (relative_error(a, e), relative_error(b, e)) for a, b, e in zip(ours, theirs, exact, strict=True) if len(a) > 1
    ]
    assert all(our_error < 1.5 * AS_GOOD * their_error for our_error, their_error in errors)
    assert sum(e for e, _ in errors) < AS_GOOD * sum(e for _, e in errors)


def test_chunks_of_a_cut_prompt_equal_one_pass() -> None:
    """Between whole prompts, as the scheduler packs them. By value: attention adds up in another order."""
    prompt = prompt_of(300)
    whole, cut = prefiller("cuda", "bf16"), prefiller("cuda", "bf16")
    alone = sequence_of(prompt, FORMATS["bf16"])
    [expected] = whole.run(PrefillChunk(alone, 300))[alone]
    sequence, others = sequence_of(prompt, FORMATS["bf16"]), [sequence_of(prompt_of(40, i), None) for i in range(2)]
    sequence.history = cut.device.new_history(300)
    cut.run(PrefillChunk(others[0], 40), PrefillChunk(sequence, 96))
    cut.run(PrefillChunk(sequence, 128))
    tokens = cut.run(PrefillChunk(sequence, 76), PrefillChunk(others[1], 40))
    logits = [logits_of(t) for t in (tokens[sequence][0], expected)]
    assert relative_error(*logits) < CLOSE
    for layer_id in range(GEOMETRY.num_layers):
        pair = [
            decode(FORMATS["bf16"], torch.from_numpy(p.raw(s, layer_id)), 300, 2, 64)
            for p, s in ((cut, sequence), (whole, alone))
        ]
        for ours, theirs in zip(*pair, strict=True):
            assert relative_error(ours, theirs) < CLOSE


def test_other_threads_go_on_while_a_value_is_fetched() -> None:
    """Shipping does, while the thread that has launched a prompt waits for its first token."""
    over, num_ticks = threading.Event(), 0
    happened = torch.cuda.Event()
    happened.record(torch.cuda.Stream())

    def tick() -> None:
        nonlocal num_ticks
        while not over.wait(0.001):
            num_ticks += happened.query()

    ticking = threading.Thread(target=tick)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**9)  # cycles: half a second
        value = torch.full((1,), 7, device="cuda")
        ticking.start()
        [on_host] = fetched(value)
    over.set()
    ticking.join()
    assert on_host.tolist() == [7]
    assert num_ticks > 50


# --- decode ---


def decoder_on(device: str, precision: str = "bf16") -> Decoder:
    model = load_model(CHECKPOINT, precision, device=device)
    if device == "cpu":
        return Decoder(model, lambda arena, tail: CpuDecode(model, arena, tail, 1), 8)
    from hmad.compute.cuda_decode import CudaDecode

    return Decoder(model, lambda arena, tail: CudaDecode(model, arena, tail, 8), 8)


FORCED = tuple(prompt_of(100, seed=5))


def forced_logits(device: str, precision: str) -> list[torch.Tensor]:
    """Logits [steps, vocab] of sequences of every format and many lengths, more of them than decode at once, under
    teacher forcing. The last few go on alone for longer than a plan of attention serves.
    """
    decoder = decoder_on(device, precision)
    shapes = [(fmt, 1 + 37 * i % 400) for i, fmt in enumerate(list(FORMATS.values()) * 2)]
    sequences = [
        decoder.sequence(fmt, n, SamplingParams(max_tokens=tokens, forced_token_ids=FORCED, want_logits=True))
        for fmt, n in shapes
        for tokens in [4 + n % 30 + (60 if n > 250 else 0)]
    ]
    tokens = decoder.decode(*sequences)
    decoder.close()
    assert all([t.token_id for t in tokens[s]] == list(FORCED[1 : s.params.max_tokens]) for s in sequences)
    return [torch.stack([logits_of(t) for t in tokens[s]]) for s in sequences]


def test_mixed_formats_and_lengths_say_what_the_cpu_says() -> None:
    exact, ours = forced_logits("cpu", "fp32"), forced_logits("cuda", "fp32")
    # 8-bit values meet float16 queries on the GPU.
    assert max(relative_error(a, b) for a, b in zip(ours, exact, strict=True)) < 5e-3
    errors = [
        [relative_error(a, e) for a, e in zip(forced_logits(device, "bf16"), exact, strict=True)]
        for device in ("cuda", "cpu")
    ]
    assert sum(errors[0]) < AS_GOOD * sum(errors[1])


def test_sampling_of_every_kind_says_what_the_cpu_says() -> None:
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.7, "presence_penalty": 0.5, "frequency_penalty": 0.4},
    ]
    answers = {}
    for device in ("cpu", "cuda"):
        decoder = decoder_on(device, "fp32")
        sequences = [
            decoder.sequence(FORMATS["fp32"], 50 + i, SamplingParams(max_tokens=30, num_logprobs=2, **kind), seed=i)
            for i, kind in enumerate(settings)
        ]
        tokens = decoder.decode(*sequences)
        answers[device] = [[t.token_id for t in tokens[s]] for s in sequences]
        decoder.close()
    assert answers["cuda"] == answers["cpu"]


def test_stop_tokens_and_cancels_while_a_step_is_in_flight() -> None:
    """Slots that are given back at once and taken again must not be written to by a step still under way."""
    decoder = decoder_on("cuda")
    [free] = decoder.decode(
        decoder.sequence(FORMATS["int8"], 90, SamplingParams(max_tokens=20, temperature=0.0))
    ).values()
    ids = [t.token_id for t in free]
    stop = next(i for i, token in enumerate(ids) if token not in ids[:i] and i > 3)
    for _ in range(20):
        params = SamplingParams(max_tokens=20, temperature=0.0, stop_token_ids=(ids[stop],))
        [stopped] = decoder.decode(decoder.sequence(FORMATS["int8"], 90, params)).values()
        assert [t.token_id for t in stopped] == ids[: stop + 1]
    long = decoder.sequence(FORMATS["bf16"], 64, SamplingParams(max_tokens=300, temperature=0.0))
    decoder.join(long)
    decoder.outputs.get(timeout=PATIENCE_S)
    decoder.engine.drop([long])
    while decoder.outputs.get(timeout=PATIENCE_S).finish_reason != "cancelled":
        pass
    assert decoder.left.get(timeout=PATIENCE_S) is long
    for slots in (long.prefix[0].slots, long.tail_slots):
        decoder.arena.release(slots)
    decoder.close()


def test_nan_in_a_step_fails_its_sequence_alone() -> None:
    decoder = decoder_on("cuda")
    good = decoder.sequence(FORMATS["bf16"], 20, SamplingParams(max_tokens=5, temperature=0.0))
    bad = decoder.sequence(FORMATS["bf16"], 20, SamplingParams(max_tokens=5, forced_token_ids=(0, 5, 5, 5, 5)))
    poison_token(decoder.model, 5)
    decoder.join(good, bad)
    errors, finished = {}, set()
    while len(errors) + len(finished) < 2:
        output = decoder.outputs.get(timeout=PATIENCE_S)
        if output.error:
            errors[output.sequence] = output.error
        elif output.ends:
            finished.add(output.sequence)
    assert finished == {good}
    assert isinstance(errors[bad], NonFiniteKVError)
    for sequence in (good, bad):
        decoder.arena.release(sequence.prefix[0].slots)
        decoder.arena.release(sequence.tail_slots)
    decoder.close()


# --- landing ---


def test_blocks_land_in_their_slots_through_lanes() -> None:
    lands_as_on_the_host(torch.device("cuda"))


# --- whole nodes ---


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "bfp8"])
def test_both_roles_on_one_gpu_serve_a_real_client(precision: str) -> None:
    flags = {"device": "cuda:0", "device_memory": "4G"}
    decode = DecodeDaemon(CHECKPOINT, **flags)
    prefill = PrefillDaemon(
        CHECKPOINT, [decode], precision=precision, max_batch_tokens=128, history_bytes="256M", **flags
    )
    with running(decode, prefill):
        client = OpenAI(base_url=f"{prefill.url}/v1", api_key="none", max_retries=0)
        prompt = "What is module json for?"
        whole = client.chat.completions.create(
            model="checkpoint", messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=40
        )
        stream = client.chat.completions.create(
            model="checkpoint",
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=40,
            stream=True,
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == whole.choices[0].message.content
        assert whole.choices[0].message.content
        many = prefill.complete(
            [prompt_of(n, n) for n in (1, 130, 400, 33)], max_tokens=30, n=2, temperature=0.7
        ).choices
        assert [len(choice["token_ids"]) for choice in many] == [30] * 8
        assert prefill.status["device"] == "cuda:0"
        decode.wait_until_empty()


class FaultyDecode(DecodeDaemon):
    program = (str(Path(__file__).parent / "faulty_node.py"),)


def test_a_kernel_that_strays_costs_the_process_and_nobody_gets_garbage() -> None:
    decode = FaultyDecode(CHECKPOINT, device="cuda:0", device_memory="4G")
    prefill = PrefillDaemon(CHECKPOINT, [decode], device="cuda:0", device_memory="4G", history_bytes="256M")
    try:
        decode.start()
        with running(prefill, healthy=False):
            prefill.wait_until("/health")
            assert prefill.complete(prompt_of(20), max_tokens=8).status == 200
            with prefill.stream(prompt=prompt_of(20), max_tokens=3000, temperature=0, ignore_eos=True) as lines:
                next(lines)
                decode.signal(signal.SIGURG)
                last = [line for line in lines if line.strip()][-2:]
            assert b'"error"' in b"".join(last)
            assert decode.end() == 1
            assert "the device has failed, and everything on it is lost" in decode.log
    finally:
        decode.kill()


def test_too_little_memory_is_told_with_the_sums() -> None:
    decode = DecodeDaemon(CHECKPOINT, device="cuda:0", device_memory="1G", arena_bytes="2G")
    decode.start()
    assert decode.end() == 2
    assert "may take 1.00 and asks for" in decode.log
    assert "arena 2.00" in decode.log
    decode.kill()
