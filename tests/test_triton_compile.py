"""Every Triton kernel compiled ahead of time, on any machine, for GPUs that are not there: no register spills, and the
payload moved by 128-bit loads. ``pytest -m rare_variant`` runs what is left out elsewhere.
"""

import re
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hmad.compute.cuda_buffers import TURNS
from hmad_kernels import (
    triton_attention,
    triton_linear,
    triton_pack,
    triton_rope,
    triton_rows,
    triton_sampling,
    triton_step,
)
from hmad_kernels.triton_attention import attend_constants, merge_constants, merge_options, tuning_for
from hmad_kernels.triton_common import FORMAT_NAMES, format_code, launch_options
from hmad_kernels.triton_pack import pack_constants, pack_options
from hmad_kernels.triton_rope import rope_constants, rope_options
from hmad_kernels.triton_rows import PIECE, PIECE_WARPS, row_constants, row_options, row_warps, silu_constants

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
CAPABILITIES: dict[str, tuple[int, int] | None] = {
    "sm_80": (8, 0),
    "sm_89": (8, 9),
    "sm_90": (9, 0),
    "sm_100": (10, 0),
    "gfx942": None,
}
CHAINING = ("sm_90", "sm_100")  # where kernels begin before the ones before them have ended
FLOATS, FENCED = ("fp32", "bf16"), ("int8", "mxfp8", "bfp8")
VALUE_BYTES = {"fp32": 4, "bf16": 2} | dict.fromkeys(("int8", "fp8_e4m3", "mxfp8", "bfp8"), 1)
POINTERS = {
    "k": "bf16", "v": "bf16", "q": "bf16", "out": "u8", "blocks": "i32", "bad_rows": "u8", "slots": "i32",
    "slot_ids": "i32", "offsets": "i32", "items": "i32", "num_items": "i32", "last_items": "i32", "seq_items": "i32",
    "block_table": "i32", "partial_values": "fp32", "partial_stats": "fp32", "x": "bf16", "delta": "bf16",
    "weight": "bf16", "gate_up": "bf16", "scales": "fp32", "acc": "i32", "row_scales": "fp32",
    "column_scales": "fp32", "qkv": "bf16", "q_weight": "bf16", "k_weight": "bf16", "rope_table": "bf16",
    "positions": "i64",
}  # fmt: skip
FLOAT_SCALARS = {"log2_scale", "eps"}
ALIGNED = {
    "num_columns",
    "depth",
    "q_stride",
    "slot_words",
    "out_stride",
    "k_token_stride",
    "k_head_stride",
    "v_token_stride",
    "v_head_stride",
    "slot_bytes",
    "num_values",
}
# Of models in float32, which are for exact tests, and what compilers older than this one lay out.
rare = pytest.mark.rare_variant
VARIANTS = [
    pytest.param(arch, head_dim, name, dtype, marks=rare if dtype == "fp32" else ())
    for arch in CAPABILITIES
    for head_dim in (64, 128)
    for name in FORMAT_NAMES
    for dtype in FLOATS
]
K_WIDTHS = [2, pytest.param(4, marks=rare)]


@pytest.fixture(autouse=True)
def kept_binaries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What did not change is not compiled again, and nothing is left in the user's home."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(request.config.cache.mkdir("triton"))
        yield


def target_of(arch: str) -> GPUTarget:
    capability = CAPABILITIES[arch]
    return (
        GPUTarget("hip", arch, 64) if capability is None else GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    )


def compiled(kernel: Any, arch: str, constants: dict[str, Any], options: dict[str, Any], **pointers: str) -> Any:
    """A kernel as a launch with aligned arguments would compile it."""
    types = POINTERS | pointers
    arguments = kernel.arg_names
    signature = {}
    for name in arguments:
        scalar = "fp32" if name in FLOAT_SCALARS else "i32"
        signature[name] = "constexpr" if name in constants else f"*{types[name]}" if name in types else scalar
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(arguments)
        if name not in constants and (name in types or name in ALIGNED)
    }
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=target_of(arch), options=options)


def assert_no_spills(binary: Any, arch: str, directory: Path) -> None:
    if CAPABILITIES[arch] is None:
        figures = r"\.(?:[sv]gpr_spill_count|private_segment_fixed_size):\s*(\d+)"
        assert re.findall(figures, binary.asm["amdgcn"]) == ["0", "0", "0"]
    else:
        usage = disassembled(binary, directory, "--dump-resource-usage")
        assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"], usage


def disassembled(binary: Any, directory: Path, *options: str) -> str:
    path = directory / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    return subprocess.run([CUOBJDUMP, *options, path], capture_output=True, text=True, check=True).stdout


def instructions(binary: Any, directory: Path) -> list[tuple[str, int]]:
    """The machine code: each instruction and its control bits."""
    line = r"/\*[0-9a-f]{4,}\*/\s+([^;]*);\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/"
    code = re.findall(line, disassembled(binary, directory, "-sass"))
    assert code
    return [(text.strip(), int(control, 16)) for text, control in code]


def wide_load_bytes(binary: Any, directory: Path) -> int:
    """Bytes that a program's 128-bit loads from global memory move, each instruction counted once."""
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.E(?:\.\w+)*\.128\b", disassembled(binary, directory, "-sass"))
    return len(loads) * 16 * 32 * binary.metadata.num_warps


GLOBAL_ACCESS = re.compile(r"\b(ld|st|red|atom|cp\.async)[\w.:]*\.global[\w.:]*[^\[]*\[ *(%\w+)[^\[]*(?:\[ *(%\w+))?")


def assert_chained(
    kernel: Any, constants: dict[str, Any], binary: Any, arch: str, directory: Path, early: set[str] | None = None, *,
    frees: bool = False,
) -> None:  # fmt: skip
    """Whether a kernel begins while the one before it runs, and frees the next one to do so; on devices that have none
    of this, it must do none. ``early`` are the arguments that it reads before it waits, having long been there; it
    writes to none before. None: it does not begin early.
    """
    can, ptx = arch in CHAINING, binary.asm.get("ptx", "")
    begins = can and early is not None
    assert ("griddepcontrol.wait" in ptx) == getattr(binary.metadata, "launch_pdl", False) == begins
    assert ("griddepcontrol.launch_dependents" in ptx) == (can and frees)
    if begins:
        accesses = accesses_before_waiting(ptx)
        names = [name for name in kernel.arg_names if name not in constants]
        assert {names[number] for _, number in accesses} == early
        assert {kind for kind, _ in accesses} <= {"ld"}
        code = [text for text, _ in instructions(binary, directory)]
        # A wait with the end behind it is that of programs which have nothing to do.
        [wait] = [i for i, (text, behind) in enumerate(pairwise(code)) if text == "ACQBULK" and behind != "EXIT"]
        touches = [text for text in code[:wait] if re.search(r"\b(?:LD|ST|RED|ATOM|UBLKCP|UTMA)\w*", text)]
        loads = [text for text in touches if re.search(r"\bLDG\b", text)]
        assert len(loads) <= len(accesses)  # so the assembler has moved none to the other side
        assert all(re.search(r"\b(?:LDG|LDC|LDCU|LDS)\b", text) for text in touches), touches


def accesses_before_waiting(ptx: str) -> list[tuple[str, int]]:
    """Accesses to global memory before the wait of programs that have work: of which kind, and by the pointer that is
    which of the kernel's parameters.
    """
    lines = [line.strip() for line in ptx[ptx.index(".entry") :].splitlines()]
    lines = [line for line in lines if re.match(r"(?:@!?%\w+ )?[a-z]", line)]
    ends = [i for i, line in enumerate(lines) if line.startswith("griddepcontrol.wait")]
    wait = next(i for i in ends if lines[i + 1] != "ret;")
    origins: dict[str, int] = {}  # of registers, but for those that were loaded
    accesses = []
    for line in lines[:wait]:
        registers = re.findall(r"%\w+", line.split(" ", 2)[-1] if line.startswith("@") else line)
        if access := GLOBAL_ACCESS.search(line):
            accesses.append((access[1], origins[access[3] or access[2]]))
        elif parameter := re.search(r"ld\.param\.[bu]64.*_param_(\d+)", line):
            origins[registers[0]] = int(parameter[1])
        elif registers and (known := [origins[register] for register in registers[1:] if register in origins]):
            origins[registers[0]] = known[0]  # an address, the pointer before the offset
    return accesses


def waits_at_fences(binary: Any, directory: Path) -> list[str]:
    """What stands behind a fence and waits for all loads (the six scoreboards of a warp) that are under way."""
    behind = [after for (text, _), after in pairwise(instructions(binary, directory)) if "MEMBAR" in text]
    return [text for text, control in behind if control >> 52 & 63 == 63]


@pytest.mark.parametrize(("arch", "head_dim", "name", "dtype"), VARIANTS)
def test_packing_compiles(arch: str, head_dim: int, name: str, dtype: str, tmp_path: Path) -> None:
    capability = CAPABILITIES[arch]
    constants = pack_constants(format_code(name), head_dim, capability)
    binary = compiled(triton_pack._pack_kernel, arch, constants, pack_options(format_code(name)), k=dtype, v=dtype)
    assert_no_spills(binary, arch, tmp_path)
    if capability is not None:
        payload = 2 * constants["NUM_ROWS"] * head_dim * VALUE_BYTES[dtype]  # K and V of a program
        payload *= 2 if (name, dtype) == ("bfp8", "bf16") else 1  # read again where subnormal numbers count
        assert 0.95 <= wide_load_bytes(binary, tmp_path) / payload <= 1


@pytest.mark.parametrize(("arch", "head_dim", "name", "dtype"), VARIANTS)
@pytest.mark.parametrize("k_width", K_WIDTHS)
def test_attention_compiles(
    arch: str, head_dim: int, name: str, dtype: str, k_width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_attention, "K_WIDTH", k_width)
    capability = CAPABILITIES[arch]
    tuning = tuning_for(name, capability)
    constants = attend_constants(format_code(name), head_dim, tuning, capability, interpreted=False)
    options = tuning.options() | launch_options(capability)  # as the first of several launches
    binary = compiled(triton_attention._attend_kernel, arch, constants, options, q=dtype)
    assert_no_spills(binary, arch, tmp_path)
    assert_chained(
        triton_attention._attend_kernel, constants, binary, arch, tmp_path, {"items", "num_items"}, frees=True
    )
    if arch in CHAINING:  # where no program has an item, one waits nevertheless
        code = [text for text, _ in instructions(binary, tmp_path)]
        assert sum(pair == ("ACQBULK", "EXIT") for pair in pairwise(code)) == 1
    if capability is not None:
        # The loop's own loads, and as many as run ahead of it: by the pipeline's depth, or written one step ahead.
        copies = tuning.num_stages if name in FLOATS else 2
        payload = copies * 2 * tuning.tokens * head_dim * VALUE_BYTES[name]
        queries = 16 * head_dim * VALUE_BYTES[dtype]  # may also be loaded so
        assert 0.95 <= wide_load_bytes(binary, tmp_path) / payload <= 1 + queries / payload
        assert ("fence.sc.cta" in binary.asm["ptx"]) == (name in FENCED and dtype == "bf16")
        assert not waits_at_fences(binary, tmp_path)


@pytest.mark.parametrize("arch", CAPABILITIES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_warps", [1, 4])
def test_merging_compiles(arch: str, head_dim: int, num_warps: int, tmp_path: Path) -> None:
    kernel, capability = triton_attention._merge_kernel, CAPABILITIES[arch]
    for out in FLOATS:
        constants = merge_constants(head_dim, num_warps, capability)
        binary = compiled(kernel, arch, constants, merge_options(num_warps, capability), out=out)
        assert_no_spills(binary, arch, tmp_path)
        assert_chained(kernel, constants, binary, arch, tmp_path, {"seq_items"})


def test_no_conversion_to_e4m3_that_sm_80_lacks(tmp_path: Path) -> None:
    """It cannot be compiled there; with it the code is shorter elsewhere."""
    code = format_code("fp8_e4m3")
    by_hand, by_hardware = (
        disassembled(
            compiled(triton_pack._pack_kernel, "sm_90", pack_constants(code, 128, capability), pack_options(code)),
            tmp_path,
            "-sass",
        )
        for capability in ((8, 0), (9, 0))
    )
    assert "E4M3" not in by_hand
    assert "E4M3" in by_hardware


EMITTED = {"plain": "bf16", "int8": "i8", "e4m3": "u8", "e4m3_fnuz": "u8"}  # in the order of their codes
ROW_WIDTHS = (4096, 5120, 25600, 32768)  # hidden sizes of Qwen3-8B and 32B, an intermediate size, and the largest
ROW_VARIANTS = [
    (arch, width, emitted)
    for arch in CAPABILITIES
    for width in ROW_WIDTHS
    for emitted in EMITTED
    # MI300 multiplies its own E4M3, and sm_80 none.
    if emitted in ("plain", "int8", {"gfx942": "e4m3_fnuz", "sm_80": None}.get(arch, "e4m3"))
]
every_row = pytest.mark.parametrize(("arch", "width", "emitted"), ROW_VARIANTS)
every_arch = pytest.mark.parametrize("arch", CAPABILITIES)


def emitting(arch: str, emitted: str) -> dict[str, Any]:
    """Arguments of ``row_constants``."""
    return {"emit": list(EMITTED).index(emitted), "capability": CAPABILITIES[arch]}


def assert_rows_compile(
    kernel: Any, arch: str, emitted: str, constants: dict[str, Any], num_warps: int, column_bytes: int, directory: Path,
    early: frozenset[str] = frozenset(),
) -> None:  # fmt: skip
    """``column_bytes`` is the payload of a column; loads of columns past the last may be left out."""
    constants = constants | ({"scales": None} if "scales" in kernel.arg_names and emitted == "plain" else {})
    chained = launch_options(CAPABILITIES[arch]) if "CHAINED" in kernel.arg_names else {}
    binary = compiled(kernel, arch, constants, row_options(num_warps) | chained, out=EMITTED[emitted])
    assert_no_spills(binary, arch, directory)
    assert_chained(kernel, constants, binary, arch, directory, set(early) if "CHAINED" in kernel.arg_names else None)
    if CAPABILITIES[arch] is not None:
        block = constants["BLOCK"]
        width = min(constants.get("WIDTH", block), block)
        assert width * column_bytes <= wide_load_bytes(binary, directory) <= block * column_bytes


@every_row
def test_norms_compile(arch: str, width: int, emitted: str, tmp_path: Path) -> None:
    constants, num_warps = row_constants(width, **emitting(arch, emitted)), row_warps(width)
    column_bytes = 3 * 2  # x, delta and the weight, in bfloat16
    early = frozenset({"weight"} if constants["BLOCK"] <= triton_rows.EAGER_BLOCK.value else {})
    kernel = triton_rows._add_rms_norm_kernel
    assert_rows_compile(kernel, arch, emitted, constants, num_warps, column_bytes, tmp_path, early)


@every_row
def test_silu_compiles(arch: str, width: int, emitted: str, tmp_path: Path) -> None:
    constants = silu_constants(width, **emitting(arch, emitted))
    num_warps = PIECE_WARPS if emitted == "plain" else row_warps(width)
    assert_rows_compile(triton_rows._silu_mul_kernel, arch, emitted, constants, num_warps, 2 * 2, tmp_path)


@every_arch
@pytest.mark.parametrize("emitted", ["int8", "e4m3"])
def test_quantizing_compiles(arch: str, emitted: str, tmp_path: Path) -> None:
    constants, num_warps = row_constants(4096, **emitting(arch, emitted)), row_warps(4096)
    assert_rows_compile(triton_rows._quantize_kernel, arch, emitted, constants, num_warps, 2, tmp_path)


@every_arch
def test_what_goes_by_pieces_compiles(arch: str, tmp_path: Path) -> None:
    for kernel, constants, column_bytes in (
        (triton_rows._round_bfp8_kernel, {}, 2),
        (triton_rows._scale_int32_kernel, {"WIDTH": 25600}, 4 + 4),
    ):
        constants = constants | {"BLOCK": PIECE}
        assert_rows_compile(kernel, arch, "plain", constants, PIECE_WARPS, column_bytes, tmp_path)


@every_arch
@pytest.mark.parametrize("tail", [None, "bf16", "fp32"])
def test_rotating_compiles(arch: str, tail: str | None, tmp_path: Path) -> None:
    capability = CAPABILITIES[arch]
    constants: dict[str, Any] = rope_constants(128, None if tail is None else format_code(tail), capability)
    if tail is None:
        constants |= dict.fromkeys(("slots", "slot_ids", "offsets", "bad_rows"))
    options = rope_options(capability)
    binary = compiled(triton_rope._norm_rope_kernel, arch, constants, options, slots="u8", bad_rows="u8")
    assert_no_spills(binary, arch, tmp_path)
    assert_chained(triton_rope._norm_rope_kernel, constants, binary, arch, tmp_path, set(), frees=True)
    if CAPABILITIES[arch] is not None:
        assert wide_load_bytes(binary, tmp_path) >= triton_rope.HEADS_PER_PROGRAM * 128 * 2


SAMPLING_POINTERS = (
    dict.fromkeys(("logits", "chunk_raw", "chunk_max", "top", "low", "gathered", "tops_out"), "fp32")
    | dict.fromkeys(("counts", "counts_row", "top_k", "num_gathered", "chunk_token"), "i32")
    | dict.fromkeys(("chunk_best", "seed", "index", "forced", "tokens_out", "tokens"), "i64")
    | dict.fromkeys(("repetition", "frequency", "presence", "temperature", "top_p", "min_p"), "fp64")
    | dict.fromkeys(("chunk_mass", "chunk_score", "total", "cutoff"), "fp64")
)


@every_arch
@pytest.mark.parametrize("name", ["tops", "plan", "gather", "cutoff", "draw", "settle", "count"])
def test_sampling_compiles(arch: str, name: str, tmp_path: Path) -> None:
    kernel = getattr(triton_sampling, f"_{name}_kernel")
    constants = triton_sampling.row_constants(151_936) if name != "count" else {"BLOCK": triton_sampling.CHUNK}
    options = triton_sampling.CUTOFF_OPTIONS if name == "cutoff" else triton_sampling.ROW_OPTIONS
    binary = compiled(kernel, arch, constants, options, **SAMPLING_POINTERS)
    assert_no_spills(binary, arch, tmp_path)
    if CAPABILITIES[arch] is not None and name in ("tops", "gather", "draw"):
        assert wide_load_bytes(binary, tmp_path) == 2 * 4 * triton_sampling.CHUNK  # the logits, and their counts


@every_arch
def test_counting_on_compiles(arch: str, tmp_path: Path) -> None:
    types = {
        "sources": "i64", "known": "i64", "index": "i64", "tail_firsts": "i32", "drawn": "i64", "tops": "fp32",
        "stops": "i64", "token_ids": "i64", "tail_slots": "i32", "tail_offsets": "i32", "turn": "i32",
        "host_drawn": "i64", "host_tops": "fp32", "host_bad_rows": "u8", "host_num_special": "i32",
    }  # fmt: skip
    for kernel, own in (
        (triton_step._begin_kernel, {"TAIL_TOKENS": 16}),
        (triton_step._finish_kernel, {"STOPS": triton_step.MOST_STOPS, "TURNS": TURNS}),
    ):
        constants = own | {"ROWS": triton_step.ROWS}
        assert_no_spills(compiled(kernel, arch, constants, triton_step.STEP_OPTIONS, **types), arch, tmp_path)


@every_arch
@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 4096), (8, 4096), (16, 24576)])
def test_few_rows_compile(arch: str, num_rows: int, num_columns: int, tmp_path: Path) -> None:
    tuning = triton_linear.tuning_for(num_rows, num_columns)
    constants = tuning.constants(CAPABILITIES[arch])
    binary = compiled(triton_linear._linear_kernel, arch, constants, tuning.options(), out="bf16")
    assert_no_spills(binary, arch, tmp_path)
    assert_chained(triton_linear._linear_kernel, constants, binary, arch, tmp_path, frees=True)
    if CAPABILITIES[arch] is not None:
        assert wide_load_bytes(binary, tmp_path) >= 2 * tuning.columns * tuning.depth
