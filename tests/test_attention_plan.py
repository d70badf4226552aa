"""Plans of decode attention on the GPU: which program reads what. No GPU is needed for them."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hmad_kernels.triton_common import FORMAT_NAMES, NO_ROW
from hmad_kernels.triton_plan import PROGRAMS_PER_MULTIPROCESSOR, item_tokens_for, plan_capacity, split_items

NO_SLOTS = np.zeros(1 << 15, np.int32)  # a block table of plans that nothing attends by


def test_items_cover_every_token_once_in_order() -> None:
    seq_segments = np.array([0, 2, 3, 3], dtype=np.int32)
    segments = np.array([[2, 200, 0], [1, 17, 7], [1, 64, 9]], dtype=np.int32)
    slots = np.arange(100, 112, dtype=np.int32)
    plan = split_items(seq_segments, segments, slots, ["int8", "fp32", "bf16"], 64, capacity=8)
    assert plan.items.shape == (3, 8, 8)
    assert plan.seq_items.tolist() == [0, 5, 6, 6]
    assert plan.num_items.tolist() == [4, 0, 2]
    assert plan.last_items.tolist() == [0, 1, NO_ROW]
    assert plan.items[0, :4].tolist() == [
        [0, 0, 0, 64, 100, 101, 102, 103],
        [0, 1, 2, 64, 102, 103, 104, 105],
        [0, 2, 4, 64, 104, 105, 106, 107],
        [0, 3, 6, 8, 106, 107, 108, 109],
    ]
    assert plan.items[2, :2].tolist() == [
        [0, 4, 7, 17, 107, 108, 109, 110],
        [1, 5, 9, 64, 109, 110, 111, 111],
    ]
    assert split_items(seq_segments, segments, slots, ["bf16", "int8"], 64).items.shape == (2, 6, 8)
    with pytest.raises(ValueError, match="segments are of other formats than bf16, fp32"):
        split_items(seq_segments, segments, slots, ["bf16", "fp32"], 64)


def test_items_refuse_odd_sizes_and_full_plans() -> None:
    seq_segments, segments = np.array([0, 1], dtype=np.int32), np.array([[2, 200, 0]], dtype=np.int32)
    with pytest.raises(ValueError, match="multiple of 32, not 48"):
        split_items(seq_segments, segments, NO_SLOTS, ["int8"], 48)
    with pytest.raises(ValueError, match="4 items of 64 tokens do not fit into a plan of 3"):
        split_items(seq_segments, segments, NO_SLOTS, ["int8"], 64, capacity=3)


def test_items_of_a_segment_are_of_about_equal_size() -> None:
    items = split_items(np.array([0, 1]), np.array([[1, 650, 4]]), NO_SLOTS, ["bf16"], 128).items[0]
    assert items[:, :4].tolist() == [[0, i, 4 + 8 * i, 128] for i in range(5)] + [[0, 5, 44, 10]]
    items = split_items(np.array([0, 1]), np.array([[2, 800, 0]]), NO_SLOTS, ["int8"], 352).items[0]
    assert items[:, 3].tolist() == [288, 288, 224]


def uniform(batch: int, context: int, tail: int = 0, name: str = "int8") -> np.ndarray:
    """The segments of a batch of equal sequences; where items begin does not matter."""
    rows = [[FORMAT_NAMES.index(name), context, 0], [FORMAT_NAMES.index("bf16"), tail, 0]]
    return np.array(rows[: 2 if tail else 1] * batch, dtype=np.int32)


SKEWED = np.array([[2, 131072, 0]] + [[2, 2048, 0]] * 192, dtype=np.int32)


@pytest.mark.parametrize(
    ("segments", "resident", "item_tokens", "num_items"),
    [
        (uniform(1, 512), 8, 32, 16),  # never less than a step
        (uniform(1, 512, name="bf16"), 4, 64, 8),
        (uniform(1, 4096), 8, 64, 64),  # 66 items of 8 programs are 132 x 4: enough where items are short
        (uniform(8, 1024), 8, 128, 64),
        (uniform(1, 10_000), 8, 128, 79),  # 66 items would be too long, and 132 too short
        (uniform(16, 1024), 8, 128, 128),  # 132 items are one wave of 132 x 8
        (uniform(1, 32768), 8, 256, 128),
        (uniform(64, 2048), 8, 2016, 128),
        (uniform(64, 2048), 12, 992, 192),  # 198 items are one wave of 132 x 12
        (uniform(64, 8192), 8, 2688, 256),  # long enough, and enough sequences, for two full waves
        (uniform(64, 8192), 12, 1600, 384),
        (uniform(64, 8192, tail=100), 12, 1600, 448),  # tails come on top
        (uniform(256, 1024), 8, 1024, 256),  # one item of each is as good as two
        (SKEWED, 8, 2080, 256),  # all of 2,048 tokens: what is longer would be waited for
        (SKEWED, 12, 2080, 256),  # two waves of 2,048 tokens take as long as three of 1,344
        (uniform(8, 1024, name="bf16"), 2, 320, 32),  # a wave is of 132 x 2
    ],
)
def test_items_fill_waves(segments: np.ndarray, resident: int, item_tokens: int, num_items: int) -> None:
    assert item_tokens_for(segments, 8, 132, dict.fromkeys(FORMAT_NAMES, resident)) == item_tokens
    assert (-(-segments[:, 1] // item_tokens)).sum() == num_items


LENGTHS = st.one_of(st.integers(0, 200), st.integers(0, 4000), st.integers(0, 200_000))
SEQUENCES = st.lists(
    st.lists(st.tuples(st.integers(0, len(FORMAT_NAMES) - 1), LENGTHS), max_size=2), min_size=1, max_size=80
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(SEQUENCES, st.sampled_from([1, 4, 8]), st.sampled_from([1, 20, 132]), st.integers(1, 16))
@example([[(2, 4000), (2, 4000)]] * 8, 8, 1, 8)  # more segments than programs
@example([[(2, 8192), (1, 100)]] * 64, 8, 132, 8)
def test_plans_never_exceed_their_capacity(
    sequences: list[list[tuple[int, int]]], heads: int, processors: int, resident: int
) -> None:
    rows = [(code, length, 0) for segments in sequences for code, length in segments]
    segments = np.array(rows, dtype=np.int32).reshape(-1, 3)
    seq_segments = np.cumsum([0] + [len(each) for each in sequences])
    item_tokens = item_tokens_for(segments, heads, processors, dict.fromkeys(FORMAT_NAMES, resident))
    capacity = plan_capacity(len(sequences), heads, processors)
    plan = split_items(seq_segments, segments, NO_SLOTS, FORMAT_NAMES, item_tokens, capacity)
    assert plan.items.shape[1] == capacity <= PROGRAMS_PER_MULTIPROCESSOR * processors // heads + 4 * len(sequences) + 1
    items = np.concatenate([plan.items[code, :number] for code, number in enumerate(plan.num_items)])
    assert sorted(items[:, 1]) == list(range(plan.seq_items[-1]))
    assert items[:, 3].sum() == segments[:, 1].sum()
    assert (items[:, 3] > 0).all()
    assert (np.diff(plan.seq_items)[items[:, 0]] > 0).all()
