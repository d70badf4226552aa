"""The transfers of a session: every rule of the state table, then both sides driven against each other."""

import copy
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import partial
from random import Random

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from hmad.facts.errors import LocalError, LocalProtocolError, RemoteProtocolError
from hmad.facts.formats import FORMATS, KVGeometry
from hmad.wire import messages as m
from hmad.wire.decode_transfer import DecodeTransfer, Lease
from hmad.wire.decode_transfers import DecodeTransfers, LayerPlace, Outcome, Verdict
from hmad.wire.digest_strikes import DigestStrikes
from hmad.wire.limits import MAX_OPEN_TRANSFERS
from hmad.wire.prefill_transfers import PrefillTransfers
from hmad.wire.transfers import State, root_digest

GEOMETRY = KVGeometry(num_layers=2, num_kv_heads=2, head_dim=64)
CELL_BYTES = GEOMETRY.block_bytes(FORMATS["bf16"], num_heads=1)
ID, OTHER_ID = b"i" * 16, b"j" * 16
MAX_TOKENS = 4
SAMPLING = m.Sampling(MAX_TOKENS, 1.0, 1.0, 0, 0.0, 0.0, 0.0, 1.0)
WRONG = b"wrong digest 16b"
CHOICES = (m.Choice(0, 1, 5), m.Choice(1, 2, 6))
LEASE_S = 10.0


def reserve(transfer_id: bytes = ID, epoch: int = 0, num_choices: int = 2, tokens: int = 48) -> m.Reserve:
    """48 tokens are three blocks of bf16."""
    return m.Reserve(transfer_id, epoch, "bf16", tokens, num_choices, SAMPLING)


def layer(
    number: int,
    first_block: int = 0,
    num_blocks: int = 3,
    first_head: int = 0,
    num_heads: int = 2,
    epoch: int = 0,
    num_layers: int = 1,
) -> m.Layer:
    digest = xxhash.xxh3_128_digest(f"{number} {first_block} {first_head}".encode())
    return m.Layer(ID, epoch, number, num_layers, first_block, num_blocks, first_head, num_heads, digest)


def size(message: m.Layer) -> int:
    return message.num_layers * message.num_blocks * message.num_heads * CELL_BYTES


LAYERS = (layer(0), layer(1))
ROOT = root_digest({(0, 0, 0): LAYERS[0].digest, (1, 0, 0): LAYERS[1].digest})
COMMIT = m.Commit(ID, 0, CHOICES, 2, ROOT)
P_ABORT = m.Abort(ID, 0, m.AbortReason.SHUTDOWN)


def entry(choice: int, index: int, finish: m.FinishReason | None = None) -> m.TokenEntry:
    return m.TokenEntry(ID, choice, index, None if finish is m.FinishReason.CANCELLED else 77, finish)


STOP, CANCELLED = m.FinishReason.STOP, m.FinishReason.CANCELLED


# --- The decode node's side --------------------------------------------------------------------------------------


def decode_side(state: State = State.SENDING) -> DecodeTransfers:
    """One transfer of two choices, brought to this state."""
    d = DecodeTransfers(GEOMETRY, first_head=0, num_heads=2, format_name="bf16")
    d.reserve(reserve())
    if state is State.RESERVING:
        return d
    d.grant(ID, LEASE_S, now_s=0.0)
    if state is State.SENDING:
        return d
    if state is State.AWAITING:
        d.abort(ID, m.AbortReason.INTERNAL)
        return d
    d.commit(COMMIT)
    if state is State.COMMITTING:
        return d
    land(d, *LAYERS)
    d.committed(ID, now_s=3.0)
    return d


def begin(d: DecodeTransfers, message: m.Layer, now_s: float = 1.0) -> LayerPlace:
    return d.layer_destination(message, size(message), now_s)


def land(d: DecodeTransfers, *messages: m.Layer) -> Outcome:
    for message in messages:
        outcome = d.layer_landed(begin(d, message), message.digest, landed_s=2.0, now_s=2.5)
    return outcome


def refuses(words: str) -> "pytest.RaisesExc[RemoteProtocolError]":
    return pytest.raises(RemoteProtocolError, match=words)


def is_gone(d: DecodeTransfers) -> bool:
    d.check_integrity()
    return not d.live() and not d.num_tombstones


def test_a_transfer_from_reserve_to_last_token() -> None:
    d = DecodeTransfers(GEOMETRY, 0, 2, "bf16")
    transfer = d.reserve(reserve())
    assert d.grant(ID, LEASE_S, 0.0) == m.Grant(ID, 0, LEASE_S)
    first = land(d, LAYERS[0])
    assert first == Outcome(Verdict.WAITING, transfer, (m.Landed(ID, 0, 0, 1, 0, 3, 0, 2, 2.0, 2.5),))
    assert d.commit(COMMIT).verdict is Verdict.WAITING
    assert land(d, LAYERS[1]).verdict is Verdict.READY
    assert d.committed(ID, 3.0) == m.Committed(ID, 0, 2.0, 2.5, 3.0)
    assert not d.token(entry(0, 1))
    assert not d.token(entry(1, 1, STOP))
    assert not d.take_released()
    assert d.token(entry(0, 2, STOP))
    assert d.take_released() == (transfer,)
    assert d.take_released() == ()
    assert is_gone(d)


def test_commit_after_the_last_layer_is_ready_at_once() -> None:
    d = decode_side()
    land(d, *LAYERS)
    assert d.commit(COMMIT).verdict is Verdict.READY


def test_layers_in_parts_and_out_of_order() -> None:
    upper = (layer(1, 2, 1, 0, 2), layer(1, 0, 2, 0, 2))
    lower = (layer(0, 1, 2, 0, 1), layer(0, 0, 3, 1, 1), layer(0, 0, 1, 0, 1))
    parts = (upper[0], lower[0], upper[1], *lower[1:])
    d = decode_side()
    land(d, *parts)
    in_order = b"".join(parts[n].digest for n in (4, 3, 1, 2, 0))
    root = xxhash.xxh3_128_digest(in_order)
    assert d.commit(replace(COMMIT, num_frames=5, root_digest=root)).verdict is Verdict.READY


def test_layers_that_leave_together() -> None:
    """The last block of both layers in one frame; what is covered by it is covered in either layer."""
    together, lower, upper = layer(0, 2, 1, num_layers=2), layer(0, 0, 2), layer(1, 0, 2)
    d, p = decode_side(), PrefillTransfers()
    p.reserve(reserve())
    p.granted(GRANT)
    for message in (upper, together, lower):
        p.layer_sent(message)
        [reply] = land(d, message).replies
        assert reply.layers == message.layers
        p.landed(reply)
    with refuses("more LAYERs|came before"):
        begin(copy.deepcopy(d), layer(1, 2, 1))
    assert d.commit(p.commit(ID, CHOICES)).verdict is Verdict.READY


def test_a_layer_that_is_missing_among_those_that_left_together() -> None:
    d = decode_side()
    land(d, layer(0, 0, 2, num_layers=2), layer(0, 2, 1))
    with refuses("all 2 LAYERs came and blocks are missing"):
        d.commit(COMMIT)


@given(st.data())
def test_cells_are_counted_one_by_one(data: st.DataObject) -> None:
    lease = Lease(2, data.draw(st.integers(1, 9)), 3, data.draw(st.integers(1, 5)), CELL_BYTES)
    first_block = data.draw(st.integers(0, lease.num_blocks - 1))
    num_blocks = data.draw(st.integers(1, lease.num_blocks - first_block))
    head = data.draw(st.integers(0, lease.num_heads - 1))
    num_heads = data.draw(st.integers(1, lease.num_heads - head))
    slow = sum(
        1 << (block * lease.num_heads + h)
        for block in range(first_block, first_block + num_blocks)
        for h in range(head, head + num_heads)
    )
    assert lease.cells(layer(0, first_block, num_blocks, 3 + head, num_heads)) == slow


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (layer(2), "layers 2 to 2, the lease has 2"),
        (layer(1, num_layers=2), "layers 1 to 2, the lease has 2"),
        (layer(2**16 - 1, num_layers=4096), "the lease has 2"),
        (layer(0, 1, 3), "blocks 1 to 3, the lease has 3"),
        (layer(0, 2**31 - 1, 2**31 - 1), "the lease has 3"),
        (layer(0, 0, 3, 1, 2), "heads 1 to 2, the lease has 2 from 0"),
        (layer(0, 0, 3, 0, 4096), "heads 0 to 4095"),
        (layer(0, epoch=1), "epoch 1 is newer than 0"),
        (replace(layer(0), transfer_id=OTHER_ID), "never reserved"),
        (replace(layer(0), via=m.Via.READ), "no staging was ever registered"),
    ],
)
def test_a_layer_outside_the_lease(message: m.Layer, words: str) -> None:
    with refuses(words):
        begin(decode_side(), message)


def test_heads_below_the_range_of_the_node() -> None:
    d = DecodeTransfers(GEOMETRY, first_head=1, num_heads=1, format_name="bf16")
    d.reserve(reserve())
    d.grant(ID, LEASE_S, 0.0)
    with refuses("heads 0 to 0, the lease has 1 from 1"):
        begin(d, layer(0, 0, 3, 0, 1))
    assert not begin(d, layer(0, 0, 3, 1, 1)).discard


@pytest.mark.parametrize("wrong_bytes", [-1, 1, CELL_BYTES])
def test_a_payload_of_the_wrong_length(wrong_bytes: int) -> None:
    with refuses("its layers, blocks and heads have"):
        decode_side().layer_destination(LAYERS[0], size(LAYERS[0]) + wrong_bytes, 1.0)


@pytest.mark.parametrize("again", [layer(0), layer(0, 2, 1), layer(0, 1, 1, 1, 1), layer(0, num_layers=2)])
def test_blocks_covered_twice(again: m.Layer) -> None:
    d = decode_side()
    begin(d, LAYERS[0])
    with refuses("came before"):
        begin(d, again)


@pytest.mark.parametrize("state", [State.RESERVING, State.DECODING])
def test_layers_only_while_sending(state: State) -> None:
    with refuses("LAYER came while|more LAYERs"):
        begin(decode_side(state), LAYERS[0])


def test_a_reserve_in_another_format_than_agreed() -> None:
    with refuses("'int8', 'bf16' was agreed"):
        decode_side().reserve(replace(reserve(OTHER_ID), format="int8"))


@pytest.mark.parametrize("state", [State.RESERVING, State.SENDING, State.COMMITTING, State.DECODING, State.AWAITING])
@pytest.mark.parametrize("epoch", [0, 1])
def test_reserved_twice_while_alive(state: State, epoch: int) -> None:
    with refuses("reserved twice while alive"):
        decode_side(state).reserve(reserve(epoch=epoch))


def test_placed_again_beside_a_tombstone() -> None:
    d = decode_side()
    d.aborted(replace(P_ABORT, num_frames=1))
    assert d.num_tombstones == 1
    with refuses("epoch 0, must be newer than 0"):
        d.reserve(reserve())
    d.reserve(reserve(epoch=1))
    d.grant(ID, LEASE_S, 0.0)
    assert land(d, layer(0)).verdict is Verdict.DISCARDED
    with refuses("more LAYERs than the 1"):
        begin(d, layer(0))
    assert land(d, layer(0, epoch=1)).verdict is Verdict.WAITING
    d.aborted(replace(P_ABORT, epoch=1, num_frames=1))
    assert is_gone(d)


def test_a_cancel_that_crosses_the_end_of_the_newest_placement() -> None:
    d = decode_side()
    d.aborted(replace(P_ABORT, num_frames=1))
    d.reserve(reserve(epoch=1))
    d.aborted(replace(P_ABORT, epoch=1))
    assert d.cancel(m.Cancel(ID, 1, "gone")).abort is None
    assert land(d, layer(0)).verdict is Verdict.DISCARDED
    assert is_gone(d)


def test_frames_of_older_epochs_are_discarded_and_counted() -> None:
    d = DecodeTransfers(GEOMETRY, 0, 2, "bf16")
    d.reserve(reserve(epoch=5))
    d.grant(ID, LEASE_S, 0.0)
    assert land(d, layer(0, epoch=4)).verdict is Verdict.DISCARDED
    assert d.commit(replace(COMMIT, epoch=4)).verdict is Verdict.DISCARDED
    assert d.aborted(replace(P_ABORT, epoch=4)) is None
    d.cancel(m.Cancel(ID, 4, "late"))
    assert d.num_stale == 4
    assert [transfer.state for transfer in d.live()] == [State.SENDING]


@pytest.mark.parametrize("frame", [COMMIT, P_ABORT, m.Cancel(ID, 0, "x")])
def test_newer_epochs_than_granted(frame: m.Commit | m.Abort | m.Cancel) -> None:
    d = decode_side()
    newer = replace(frame, epoch=1)
    with refuses("newest"):
        receive(d, newer)


@pytest.mark.parametrize("frame", [COMMIT, P_ABORT])
def test_ids_never_reserved(frame: m.Commit | m.Abort) -> None:
    with refuses("never reserved"):
        receive(decode_side(), replace(frame, transfer_id=OTHER_ID))


def receive(d: DecodeTransfers, frame: m.Commit | m.Abort | m.Cancel) -> object:
    match frame:
        case m.Commit():
            return d.commit(frame)
        case m.Abort():
            return d.aborted(frame)
        case m.Cancel():
            return d.cancel(frame)


def test_too_many_open_transfers() -> None:
    d = DecodeTransfers(GEOMETRY, 0, 2, "bf16")
    for number in range(MAX_OPEN_TRANSFERS):
        d.reserve(reserve(number.to_bytes(16, "little")))
    with refuses("more than 4096 open transfers"):
        d.reserve(reserve())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"choices": (*CHOICES, m.Choice(2, 3, 4))}, "choice 2 of 2"),
        ({"choices": (CHOICES[0], CHOICES[0])}, "a choice twice"),
        ({"num_frames": 1}, "1 LAYERs announced, 2 came"),
        ({"num_frames": 13}, "12 is the most"),
    ],
)
def test_a_wrong_commit(changes: dict[str, object], words: str) -> None:
    d = decode_side()
    land(d, *LAYERS)
    with refuses(words):
        d.commit(replace(COMMIT, **changes))


def test_choices_that_ended_with_token_0_are_left_out_of_commit() -> None:
    d = decode_side()
    land(d, *LAYERS)
    assert d.commit(replace(COMMIT, choices=CHOICES[1:])).verdict is Verdict.READY
    d.committed(ID, 3.0)
    with pytest.raises(LocalProtocolError, match="no unfinished choice 0"):
        d.token(entry(0, 1))
    assert d.token(entry(1, 1, STOP))


@pytest.mark.parametrize("commit_first", [True, False])
def test_all_frames_came_and_blocks_are_missing(commit_first: bool) -> None:
    d = decode_side()
    commit = replace(COMMIT, num_frames=1)
    if commit_first:
        d.commit(commit)
        with refuses("blocks are missing"):
            land(d, LAYERS[0])
    else:
        land(d, LAYERS[0])
        with refuses("blocks are missing"):
            d.commit(commit)


def test_more_layers_than_announced() -> None:
    d = decode_side()
    land(d, layer(0, 0, 1), layer(0, 1, 1))
    d.commit(replace(COMMIT, num_frames=3))
    begin(d, layer(0, 2, 1))
    with refuses("more LAYERs than the 3"):
        begin(d, layer(1))


def test_a_second_terminal_frame_of_p() -> None:
    for first, second in ((COMMIT, COMMIT), (COMMIT, P_ABORT), (replace(P_ABORT, num_frames=1), COMMIT)):
        d = decode_side()
        receive(d, first)
        with refuses("came while"):
            receive(d, second)


def test_commit_before_grant() -> None:
    with refuses("COMMIT came while"):
        decode_side(State.RESERVING).commit(COMMIT)


def test_a_wrong_digest_aborts_the_transfer_alone() -> None:
    d = decode_side()
    outcome = d.layer_landed(begin(d, LAYERS[0]), WRONG, 2.0, 2.5)
    assert outcome.verdict is Verdict.DIGEST_MISMATCH
    (abort,) = outcome.replies
    assert isinstance(abort, m.Abort)
    assert abort.reason is m.AbortReason.DIGEST_MISMATCH
    assert d.take_released() == (outcome.transfer,)
    assert d.commit(replace(COMMIT, num_frames=1)).verdict is Verdict.DISCARDED
    assert is_gone(d)


def test_a_missing_digest_is_a_wrong_one() -> None:
    d = decode_side()
    assert d.layer_landed(begin(d, LAYERS[0]), None, 2.0, 2.5).verdict is Verdict.DIGEST_MISMATCH


def test_without_digests_nothing_is_compared() -> None:
    d = DecodeTransfers(GEOMETRY, 0, 2, "bf16", check_digests=False)
    d.reserve(reserve())
    d.grant(ID, LEASE_S, 0.0)
    assert d.layer_landed(begin(d, LAYERS[0]), None, 2.0, 2.5).verdict is Verdict.WAITING


@pytest.mark.parametrize("commit_first", [True, False])
def test_a_wrong_root_digest_aborts_the_transfer(commit_first: bool) -> None:
    d = decode_side()
    commit = replace(COMMIT, root_digest=WRONG)
    if commit_first:
        d.commit(commit)
        outcome = land(d, *LAYERS)
        assert isinstance(outcome.replies[0], m.Landed)
    else:
        land(d, *LAYERS)
        outcome = d.commit(commit)
    assert outcome.verdict is Verdict.DIGEST_MISMATCH
    assert isinstance(outcome.replies[-1], m.Abort)
    assert is_gone(d)


def test_three_strikes_within_a_minute() -> None:
    strikes = DigestStrikes()
    assert [strikes.add(t) for t in (0.0, 50.0, 60.1, 110.0, 110.1)] == [False, False, False, True, True]
    assert [DigestStrikes().add(0.0) for _ in range(3)] == [False] * 3


def test_committed_only_when_ready() -> None:
    d = decode_side(State.COMMITTING)
    land(d, LAYERS[0])
    with pytest.raises(LocalProtocolError, match="1 LAYERs of 2"):
        d.committed(ID, 3.0)


def test_the_lease_is_renewed_by_every_layer() -> None:
    d = decode_side()
    assert not d.expired(LEASE_S)
    assert d.expired(LEASE_S + 0.1) == d.live()
    place = begin(d, LAYERS[0], now_s=5.0)
    assert not d.expired(15.0)
    assert d.expired(15.1)
    d.layer_landed(place, LAYERS[0].digest, 7.0, 8.0)
    assert not d.expired(18.0)
    assert d.expired(18.1)


def test_only_what_waits_for_layers_expires() -> None:
    assert not decode_side(State.RESERVING).expired(1e9)
    assert decode_side(State.COMMITTING).expired(1e9)
    assert not decode_side(State.DECODING).expired(1e9)
    ready = decode_side(State.COMMITTING)
    land(ready, *LAYERS)
    assert not ready.expired(1e9)


def test_slots_are_kept_while_bytes_are_received_into_them() -> None:
    d = decode_side()
    place = begin(d, LAYERS[0])
    d.abort(ID, m.AbortReason.LEASE_EXPIRED)
    later = begin(d, LAYERS[0])
    assert later.discard
    d.layer_landed(later, LAYERS[0].digest, 2.0, 2.5)
    assert not d.take_released()
    assert d.layer_landed(place, LAYERS[0].digest, 2.0, 2.5).verdict is Verdict.DISCARDED
    assert d.take_released() == (place.transfer,)


def test_a_lost_session_names_every_transfer_that_holds_slots() -> None:
    d = decode_side()
    place = begin(d, LAYERS[0])
    d.abort(ID, m.AbortReason.LEASE_EXPIRED)
    d.reserve(reserve(OTHER_ID))
    assert d.close() == (place.transfer,)
    assert is_gone(d)


def test_a_tombstone_counts_layers_until_all_came() -> None:
    d = decode_side(State.AWAITING)
    assert land(d, LAYERS[0]).verdict is Verdict.DISCARDED
    assert d.commit(COMMIT).verdict is Verdict.DISCARDED
    assert d.num_tombstones == 1
    assert land(d, LAYERS[1]).verdict is Verdict.DISCARDED
    assert d.num_discarded == 2
    assert is_gone(d)
    with refuses("never reserved or has ended"):
        begin(d, LAYERS[1])


def test_a_tombstone_waits_for_a_layer_that_is_half_there() -> None:
    d = decode_side(State.AWAITING)
    place = begin(d, LAYERS[0])
    d.aborted(replace(P_ABORT, num_frames=1))
    assert d.num_tombstones == 1
    d.layer_landed(place, None, 2.0, 2.5)
    assert is_gone(d)


def test_a_tombstone_does_not_count_for_ever() -> None:
    d = decode_side(State.AWAITING)
    for _ in range(12):
        begin(d, LAYERS[0])
    with refuses("more LAYERs than the 12"):
        begin(d, LAYERS[0])


@pytest.mark.parametrize("state", [State.RESERVING, State.SENDING])
def test_p_aborts_and_d_answers_with_its_own_terminal_frame(state: State) -> None:
    d = decode_side(state)
    assert d.aborted(P_ABORT) == m.Abort(ID, 0, m.AbortReason.CANCELLED)
    assert is_gone(d)


def test_denied_waits_for_ps_terminal_frame() -> None:
    d = decode_side(State.RESERVING)
    assert d.deny(ID, m.DenyReason.FULL, "full", 1.0) == m.Deny(ID, 0, m.DenyReason.FULL, "full", 1.0)
    with pytest.raises(LocalProtocolError):
        d.grant(ID, LEASE_S, 0.0)
    assert d.num_tombstones == 1
    assert d.aborted(P_ABORT) is None
    assert d.take_released() == ()
    assert is_gone(d)


@pytest.mark.parametrize("state", [State.RESERVING, State.SENDING, State.COMMITTING])
def test_cancel_before_committed_is_an_abort(state: State) -> None:
    d = decode_side(state)
    assert d.cancel(m.Cancel(ID, 0, "gone")).abort == m.Abort(ID, 0, m.AbortReason.CANCELLED)
    assert not d.live()


def test_cancel_after_committed_names_the_choices_to_finish() -> None:
    d = decode_side(State.DECODING)
    assert d.cancel(m.Cancel(ID, 0, "gone", (1,))).choices == (1,)
    d.token(entry(1, 1, CANCELLED))
    assert d.cancel(m.Cancel(ID, 0, "gone")).choices == (0,)
    assert d.token(entry(0, 1, CANCELLED))
    assert is_gone(d)


def test_cancel_of_some_choices_before_committed_waits() -> None:
    d = decode_side(State.COMMITTING)
    cancellation = d.cancel(m.Cancel(ID, 0, "gone", (1,)))
    assert (cancellation.abort, cancellation.choices) == (None, ())
    outcome = land(d, *LAYERS)
    d.committed(ID, 3.0)
    assert outcome.transfer is not None
    assert outcome.transfer.cancelled_choices == {1}


def test_cancel_of_all_choices_one_by_one_is_an_abort() -> None:
    d = decode_side()
    assert d.cancel(m.Cancel(ID, 0, "gone", (1,))).abort is None
    assert d.cancel(m.Cancel(ID, 0, "gone", (0,))).abort is not None


def test_cancel_of_all_that_was_committed_is_an_abort() -> None:
    d = decode_side()
    d.commit(replace(COMMIT, choices=CHOICES[1:]))
    assert d.cancel(m.Cancel(ID, 0, "gone", (1,))).abort is not None


def test_cancel_of_a_choice_that_was_left_out_of_commit() -> None:
    d = decode_side()
    d.cancel(m.Cancel(ID, 0, "gone", (0,)))
    d.commit(replace(COMMIT, choices=CHOICES[1:]))
    outcome = land(d, *LAYERS)
    d.committed(ID, 3.0)
    assert outcome.transfer is not None
    assert outcome.transfer.cancelled_choices == set()


def test_cancel_of_a_choice_that_is_not_there() -> None:
    with refuses("names choice 2"):
        decode_side().cancel(m.Cancel(ID, 0, "gone", (2,)))


def test_cancel_of_what_has_ended_is_ignored() -> None:
    d = decode_side(State.AWAITING)
    assert d.cancel(m.Cancel(ID, 0, "gone")).abort is None
    d.aborted(P_ABORT)
    assert d.cancel(m.Cancel(ID, 0, "gone")).abort is None
    assert is_gone(d)


@pytest.mark.parametrize("state", [State.RESERVING, State.SENDING, State.COMMITTING, State.DECODING])
def test_d_may_abort_at_any_time_and_once(state: State) -> None:
    d = decode_side(state)
    assert d.abort(ID, m.AbortReason.PREEMPTED, "later") == m.Abort(ID, 0, m.AbortReason.PREEMPTED, "later")
    with pytest.raises(LocalProtocolError):
        d.abort(ID, m.AbortReason.PREEMPTED)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (entry(0, 2), "token index 2, 1 is next"),
        (entry(2, 1), "no unfinished choice 2"),
        (m.TokenEntry(ID, 0, 1, None), "ends without a token"),
        (m.TokenEntry(ID, 0, 1, 5, CANCELLED), "ends without a token"),
    ],
)
def test_tokens_out_of_order(wrong: m.TokenEntry, words: str) -> None:
    with pytest.raises(LocalProtocolError, match=words):
        decode_side(State.DECODING).token(wrong)
    with refuses(words):
        prefill_side(State.DECODING).tokens(m.Tokens((wrong,)))


def test_integrity_is_checked() -> None:
    d = decode_side()
    (transfer,) = d.live()
    transfer.covered[0] = 1 << 6
    with pytest.raises(LocalError, match="outside its lease"):
        d.check_integrity()
    transfer.covered[0] = 0
    transfer.num_arrived = 1
    with pytest.raises(LocalError, match="miscounted"):
        d.check_integrity()


# --- The prefill node's side -------------------------------------------------------------------------------------

GRANT = m.Grant(ID, 0, LEASE_S)
COMMITTED = m.Committed(ID, 0, 1.0, 2.0, 3.0)
DENY = m.Deny(ID, 0, m.DenyReason.FULL, "full", 1.0)
D_ABORT = m.Abort(ID, 0, m.AbortReason.PREEMPTED)


def prefill_side(state: State) -> PrefillTransfers:
    """One transfer of two choices, brought to this state; LAYERs landed where one could be."""
    p = PrefillTransfers()
    p.reserve(reserve())
    if state is State.RESERVING:
        return p
    p.granted(GRANT)
    for message in LAYERS:
        p.layer_sent(message)
    if state is State.AWAITING:
        p.abort(ID, m.AbortReason.SHUTDOWN)
    if state in (State.SENDING, State.AWAITING):
        return p
    assert p.commit(ID, CHOICES) == COMMIT
    if state is State.COMMITTING:
        return p
    for message in LAYERS:
        p.landed(landed(message))
    p.committed(COMMITTED)
    return p


def landed(message: m.Layer) -> m.Landed:
    where = [getattr(message, name) for name in m.KVRange.__struct_fields__]
    return m.Landed(*where, 1.0, 2.0)


def test_p_ends_with_the_last_entry() -> None:
    p = prefill_side(State.DECODING)
    p.tokens(m.Tokens((entry(1, 1), entry(0, 1, STOP))))
    assert p.state(ID) is State.DECODING
    p.tokens(m.Tokens((entry(1, 2, CANCELLED),)))
    assert p.state(ID) is State.ENDED
    assert p.close() == ()


@pytest.mark.parametrize("state", [State.RESERVING, State.SENDING])
def test_p_answers_ds_terminal_frame_with_its_own(state: State) -> None:
    p = prefill_side(state)
    sent = 0 if state is State.RESERVING else 2
    assert p.aborted(D_ABORT) == m.Abort(ID, 0, m.AbortReason.PREEMPTED, num_frames=sent)
    assert p.state(ID) is State.ENDED
    p.reserve(reserve(epoch=1))


@pytest.mark.parametrize("state", [State.COMMITTING, State.DECODING, State.AWAITING])
def test_p_owes_nothing_after_its_terminal_frame(state: State) -> None:
    p = prefill_side(state)
    assert p.aborted(D_ABORT) is None
    assert p.state(ID) is State.ENDED


def test_p_answers_a_deny() -> None:
    p = prefill_side(State.RESERVING)
    assert p.denied(DENY) == m.Abort(ID, 0, m.AbortReason.CANCELLED)
    with refuses("unknown, or it has ended"):
        p.granted(GRANT)


def test_a_grant_that_crosses_ps_abort() -> None:
    p = prefill_side(State.RESERVING)
    assert p.abort(ID, m.AbortReason.SHUTDOWN).num_frames == 0
    assert p.granted(GRANT).state is State.AWAITING
    with pytest.raises(LocalProtocolError):
        p.layer_sent(LAYERS[0])


def test_abort_says_how_many_layers_were_begun() -> None:
    assert prefill_side(State.SENDING).abort(ID, m.AbortReason.SHUTDOWN).num_frames == 2


@pytest.mark.parametrize("state", [State.COMMITTING, State.DECODING, State.AWAITING])
def test_p_sends_one_terminal_frame(state: State) -> None:
    p = prefill_side(state)
    with pytest.raises(LocalProtocolError):
        p.abort(ID, m.AbortReason.SHUTDOWN)
    with pytest.raises(LocalProtocolError):
        p.commit(ID, CHOICES)


@pytest.mark.parametrize("state", [State.RESERVING, State.SENDING, State.COMMITTING, State.DECODING])
def test_p_may_cancel_at_any_time(state: State) -> None:
    p = prefill_side(state)
    assert p.cancel(ID, "gone", (1,)) == m.Cancel(ID, 0, "gone", (1,))
    assert p.state(ID) is state


def test_p_does_not_cancel_what_is_over() -> None:
    assert prefill_side(State.AWAITING).cancel(ID, "gone") is None
    assert PrefillTransfers().cancel(ID, "gone") is None


@pytest.mark.parametrize(
    "wrong",
    [
        landed(layer(0, 0, 2)),
        landed(layer(0, 0, 3, 0, 1)),
        landed(layer(0, 1, 3)),
        landed(layer(0, num_layers=2)),
        landed(replace(layer(0), transfer_id=OTHER_ID)),
        landed(layer(0, epoch=1)),
    ],
)
def test_landed_must_match_a_layer_on_its_way(wrong: m.Landed) -> None:
    with refuses("LANDED"):
        prefill_side(State.SENDING).landed(wrong)


def test_landed_twice() -> None:
    p = prefill_side(State.SENDING)
    p.landed(landed(LAYERS[0]))
    with refuses("matches no LAYER"):
        p.landed(landed(LAYERS[0]))


def test_committed_with_layers_that_did_not_land() -> None:
    with refuses("2 LAYERs not LANDED"):
        prefill_side(State.COMMITTING).committed(COMMITTED)


def test_a_layer_is_sent_once_and_in_its_epoch() -> None:
    p = prefill_side(State.SENDING)
    for wrong in (LAYERS[0], layer(0, 1, 1, epoch=1)):
        with pytest.raises(LocalProtocolError):
            p.layer_sent(wrong)


def test_p_reserves_an_id_once_while_alive() -> None:
    with pytest.raises(LocalProtocolError, match="twice while alive"):
        prefill_side(State.AWAITING).reserve(reserve(epoch=1))


def test_a_grant_of_cached_tokens_that_p_did_not_offer() -> None:
    with refuses("skips 16 tokens"):
        prefill_side(State.RESERVING).granted(replace(GRANT, num_cached_tokens=16))


@pytest.mark.parametrize("state", [State.RESERVING, State.SENDING, State.COMMITTING, State.AWAITING])
def test_tokens_only_while_decoding(state: State) -> None:
    with refuses("TOKENS came while"):
        prefill_side(state).tokens(m.Tokens((entry(0, 1),)))


def test_no_more_tokens_than_asked_for() -> None:
    p = prefill_side(State.DECODING)
    p.tokens(m.Tokens(tuple(entry(0, index) for index in range(1, MAX_TOKENS))))
    assert p.state(ID) is State.DECODING
    with refuses("at most 4 were asked for"):
        p.tokens(m.Tokens((entry(0, MAX_TOKENS),)))


@pytest.mark.parametrize("wrong", [GRANT, DENY, COMMITTED, D_ABORT])
def test_frames_for_unknown_transfers_and_other_epochs(wrong: m.Grant | m.Deny | m.Committed | m.Abort) -> None:
    for changes, words in (({"transfer_id": OTHER_ID}, "unknown"), ({"epoch": 1}, "for epoch 1")):
        with refuses(words):
            take(prefill_side(State.RESERVING), replace(wrong, **changes))


def take(p: PrefillTransfers, frame: m.AnyMessage) -> m.Abort | None:
    match frame:
        case m.Grant():
            p.granted(frame)
        case m.Deny():
            return p.denied(frame)
        case m.Landed():
            p.landed(frame)
        case m.Committed():
            p.committed(frame)
        case m.Tokens():
            p.tokens(frame)
        case m.Abort():
            return p.aborted(frame)
    return None


@pytest.mark.parametrize(
    ("state", "legal"),
    [
        (State.RESERVING, {m.Grant, m.Deny, m.Abort}),
        (State.SENDING, {m.Landed, m.Abort}),
        (State.COMMITTING, {m.Landed, m.Abort}),
        (State.DECODING, {m.Tokens, m.Abort}),
        (State.AWAITING, {m.Grant, m.Deny, m.Landed, m.Abort}),
    ],
)
def test_what_p_takes_in_each_state(state: State, legal: set[type]) -> None:
    frames = (GRANT, DENY, landed(LAYERS[0]), COMMITTED, m.Tokens((entry(0, 1),)), D_ABORT)
    taken = set()
    for frame in frames:
        try:
            take(prefill_side(state), frame)
        except RemoteProtocolError:
            continue
        taken.add(type(frame))
    assert taken == legal


# --- Both sides against each other -------------------------------------------------------------------------------

Key = tuple[bytes, int]  # transfer id and epoch
IDS = tuple(bytes([number] * 16) for number in range(3))
Move = Callable[[], None]


class Session:
    """P and D over two control and two bulk channels, each in order, none in step with another.

    ``moves`` are all that can happen next; ``random`` decides what does.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        self.p = PrefillTransfers()
        self.d = DecodeTransfers(GEOMETRY, 0, 2, "bf16")
        self.to_d: deque[m.AnyMessage] = deque()
        self.to_p: deque[m.AnyMessage] = deque()
        self.bulk: tuple[deque[m.Layer], deque[m.Layer]] = (deque(), deque())
        self.arriving: list[LayerPlace | None] = [None, None]
        self.newest: dict[bytes, m.Reserve] = {}
        self.unsent: dict[bytes, list[m.Layer]] = {}
        self.terminals: Counter[tuple[str, Key]] = Counter()
        self.granted: Counter[Key] = Counter()
        self.released: Counter[Key] = Counter()
        self.now_s = 0.0

    def run(self, num_moves: int) -> None:
        for _ in range(num_moves):
            self.random.choice(self.moves())()
            self.check()
        self.end()

    def moves(self) -> list[Move]:
        of_transfers = [move for transfer_id in IDS for move in self.p_moves(transfer_id) + self.d_moves(transfer_id)]
        return of_transfers + self.channel_moves() * 2 + [self.time_passes]

    def p_moves(self, transfer_id: bytes) -> list[Move]:
        match self.p.state(transfer_id):
            case State.ENDED:
                return [partial(self.p_reserves, transfer_id)]
            case State.RESERVING | State.COMMITTING | State.DECODING:
                return [partial(self.p_stops, transfer_id)] * self.one_in(4)
            case State.SENDING:
                go_on = self.p_sends_a_layer if self.unsent[transfer_id] else self.p_commits
                stop: list[Move] = [partial(self.p_stops, transfer_id)] * self.one_in(4)
                return [partial(go_on, transfer_id)] * 3 + stop
        return []

    def d_moves(self, transfer_id: bytes) -> list[Move]:
        transfer = self.live(transfer_id)
        if transfer is None:
            return []
        if transfer.state is State.RESERVING:
            return [partial(self.d_decides, transfer)]
        moves: list[Move] = [partial(self.d_aborts, transfer)] * self.one_in(8)
        if transfer.complete:
            moves.append(partial(self.d_joins, transfer))
        if transfer.state is State.DECODING:
            moves.append(partial(self.d_steps, transfer))
        return moves

    def channel_moves(self) -> list[Move]:
        busy: list[Move] = [partial(self.bulk_moves, n) for n in (0, 1) if self.bulk[n] or self.arriving[n]]
        return [self.control_reaches_d] * bool(self.to_d) + [self.control_reaches_p] * bool(self.to_p) + busy

    def one_in(self, number: int) -> bool:
        return self.random.randrange(number) == 0

    # What P's role does

    def p_reserves(self, transfer_id: bytes) -> None:
        epoch = self.newest[transfer_id].epoch + 1 if transfer_id in self.newest else 0
        message = reserve(transfer_id, epoch, self.random.randint(1, 3), self.random.randint(1, 40))
        self.p.reserve(message)
        self.newest[transfer_id] = message
        self.unsent[transfer_id] = layers_of(message, self.random)
        self.to_d.append(message)

    def p_sends_a_layer(self, transfer_id: bytes) -> None:
        message = self.unsent[transfer_id].pop()
        self.p.layer_sent(message)
        self.random.choice(self.bulk).append(message)

    def p_commits(self, transfer_id: bytes) -> None:
        indices = range(self.newest[transfer_id].num_choices)
        some = self.random.sample(indices, self.random.randint(1, len(indices)))
        self.p_says(self.p.commit(transfer_id, tuple(m.Choice(index, index, 9) for index in some)))

    def p_stops(self, transfer_id: bytes) -> None:
        if self.p.state(transfer_id) in (State.RESERVING, State.SENDING) and self.one_in(2):
            self.p_says(self.p.abort(transfer_id, m.AbortReason.NON_FINITE))
        else:
            indices = range(self.newest[transfer_id].num_choices)
            some = self.random.sample(indices, self.random.randint(0, len(indices)))
            self.p_says(self.p.cancel(transfer_id, "gone", tuple(some)))

    # What D's role does

    def d_decides(self, transfer: DecodeTransfer) -> None:
        if self.one_in(6):
            self.d_says(self.d.deny(transfer.transfer_id, m.DenyReason.FULL, "full", 1.0))
        elif self.one_in(6):
            self.d_aborts(transfer)
        else:
            self.granted[transfer.transfer_id, transfer.epoch] += 1
            self.d_says(self.d.grant(transfer.transfer_id, LEASE_S, self.now_s))

    def d_aborts(self, transfer: DecodeTransfer) -> None:
        self.d_says(self.d.abort(transfer.transfer_id, m.AbortReason.PREEMPTED))

    def d_joins(self, transfer: DecodeTransfer) -> None:
        self.d_says(self.d.committed(transfer.transfer_id, self.now_s))
        self.d_finishes(transfer, transfer.cancelled_choices)

    def d_steps(self, transfer: DecodeTransfer) -> None:
        choice = self.random.choice(sorted(transfer.next_index))
        index = transfer.next_index[choice]
        reason = STOP if index == MAX_TOKENS - 1 or self.one_in(3) else None
        self.d_sends_token(m.TokenEntry(transfer.transfer_id, choice, index, 8, reason))

    def d_finishes(self, transfer: DecodeTransfer, choices: Iterable[int]) -> None:
        for choice in choices:
            index = transfer.next_index[choice]
            self.d_sends_token(m.TokenEntry(transfer.transfer_id, choice, index, None, CANCELLED))

    def time_passes(self) -> None:
        self.now_s += self.random.random() * LEASE_S / 2
        for transfer in self.d.expired(self.now_s):
            self.d_aborts(transfer)

    # What the channels do

    def control_reaches_d(self) -> None:
        message = self.to_d.popleft()
        self.duplicate_is_refused(message)
        match message:
            case m.Reserve():
                self.d.reserve(message)
            case m.Commit():
                self.d_takes(self.d.commit(message))
            case m.Abort():
                self.d_says(self.d.aborted(message))
            case m.Cancel():
                self.d_cancels(message)

    def d_cancels(self, message: m.Cancel) -> None:
        transfer = self.live(message.transfer_id)
        cancellation = self.d.cancel(message)
        self.d_says(cancellation.abort)
        if transfer is not None:
            self.d_finishes(transfer, cancellation.choices)

    def control_reaches_p(self) -> None:
        self.p_says(take(self.p, self.to_p.popleft()))

    def bulk_moves(self, channel: int) -> None:
        place = self.arriving[channel]
        if place is not None:
            self.arriving[channel] = None
            digest = WRONG if self.one_in(30) else place.layer.digest
            self.d_takes(self.d.layer_landed(place, digest, self.now_s, self.now_s))
        else:
            message = self.bulk[channel].popleft()
            self.arriving[channel] = self.d.layer_destination(message, size(message), self.now_s)

    def duplicate_is_refused(self, message: m.AnyMessage) -> None:
        """Every frame of P but CANCEL is a fact: told twice, the second is refused."""
        d = copy.deepcopy(self.d)
        match message:
            case m.Reserve():
                d.reserve(message)
                with refuses("reserved twice"):
                    d.reserve(message)
            case m.Commit() | m.Abort():
                receive(d, message)
                with refuses("came while|never reserved"):
                    receive(d, message)

    # Bookkeeping

    def live(self, transfer_id: bytes) -> DecodeTransfer | None:
        return next((t for t in self.d.live() if t.transfer_id == transfer_id), None)

    def p_says(self, message: m.Commit | m.Abort | m.Cancel | None) -> None:
        if isinstance(message, m.Commit | m.Abort):
            self.terminals["P", (message.transfer_id, message.epoch)] += 1
        if message is not None:
            self.to_d.append(message)

    def d_says(self, message: m.AnyMessage | None) -> None:
        if isinstance(message, m.Deny | m.Abort):
            self.terminals["D", (message.transfer_id, message.epoch)] += 1
        if message is not None:
            self.to_p.append(message)

    def d_takes(self, outcome: Outcome) -> None:
        for reply in outcome.replies:
            self.d_says(reply)

    def d_sends_token(self, message: m.TokenEntry) -> None:
        if self.d.token(message):
            self.terminals["D", (message.transfer_id, self.newest[message.transfer_id].epoch)] += 1
        self.to_p.append(m.Tokens((message,)))

    def check(self) -> None:
        """Both tables are sound; slots are released once, and never while bytes are received into them."""
        self.p.check_integrity()
        self.d.check_integrity()
        filling = {(p.layer.transfer_id, p.layer.epoch) for p in self.arriving if p is not None and not p.discard}
        for transfer in self.d.take_released():
            assert (transfer.transfer_id, transfer.epoch) not in filling
            self.released[transfer.transfer_id, transfer.epoch] += 1
        assert self.released <= self.granted
        assert all(count == 1 for count in self.terminals.values())

    def end(self) -> None:
        """Whatever happened: when P lets go of everything, both sides come to an end and nothing is left."""
        for transfer_id in IDS:
            if self.p.state(transfer_id) in (State.RESERVING, State.SENDING):
                self.p_says(self.p.abort(transfer_id, m.AbortReason.SHUTDOWN))
            else:
                self.p_says(self.p.cancel(transfer_id, "gone"))
        while moves := self.channel_moves():
            self.random.choice(moves)()
            self.check()
        assert self.p.close() == ()
        assert (self.d.live(), self.d.num_tombstones, self.d.close()) == ((), 0, ())
        assert self.released == self.granted
        placements = [(t, epoch) for t, message in self.newest.items() for epoch in range(message.epoch + 1)]
        assert self.terminals == Counter({(side, key): 1 for side in "PD" for key in placements})


def layers_of(message: m.Reserve, random: Random) -> list[m.Layer]:
    """All LAYERs of a prompt, in parts and in any order."""
    num_blocks = FORMATS["bf16"].num_blocks(message.num_prompt_tokens)
    cut = random.randint(1, num_blocks)
    blocks = [(0, cut), (cut, num_blocks - cut)] if cut < num_blocks else [(0, num_blocks)]
    heads = random.choice([[(0, 2)], [(0, 1), (1, 1)]])
    layers = random.choice([[(0, 2)], [(0, 1), (1, 1)]])
    parts = [
        replace(layer(first, *run, *head, message.epoch, num_layers), transfer_id=message.transfer_id)
        for first, num_layers in layers
        for run in blocks
        for head in heads
    ]
    return random.sample(parts, len(parts))


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=True))
def test_both_sides_always_come_to_an_end(random: Random) -> None:
    Session(random).run(num_moves=150)
