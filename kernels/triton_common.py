"""What the Triton kernels share: the KV formats as compile-time constants, exact bit patterns, and launch checks.

A format is a compile-time branch; its layout is that of docs/formats.md. Formats with 8-bit values are read as words
of four bytes, because 128-bit loads and arithmetic on two values at a time are what keeps the kernels memory-bound.
"""

import torch
import triton
import triton.language as tl

# Formats by code: the code is the index of the name.
FORMAT_NAMES = ("fp32", "bf16", "int8", "fp8_e4m3", "mxfp8", "bfp8")
TOKENS_PER_BLOCK = (8, 16, 32, 32, 32, 32)
FP32, BF16, INT8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FP8_E4M3, MXFP8, BFP8 = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)

INFINITY_BITS = tl.constexpr(0x7F800000)
BF16_OVERFLOW_BITS = tl.constexpr(0x7F7F8000)  # from here on a float32 rounds to a bfloat16 infinity
TILE_BYTES = tl.constexpr(1088)  # a bfp8 tile: 64 exponents, then 1,024 values
HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float32)  # what K, V, queries and results may be
ALIGN_BYTES = 16  # of every row and block: one 128-bit load
# Of an item of attention (triton_plan.split_items): 32 bytes, the last of them slots.
ITEM_FIELDS, FIRST_SLOTS = tl.constexpr(8), tl.constexpr(4)
NO_ROW = -1  # in columns that name a row, a slot or a token: there is none
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
ROUND_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits


def format_code(format_name: str) -> int:
    """The code of a format, or ValueError."""
    if format_name not in FORMAT_NAMES:
        raise ValueError(f"unknown KV format {format_name!r}")
    return FORMAT_NAMES.index(format_name)


def panel_bytes(code: int, head_dim: int) -> int:
    """Bytes of one head's K or V of one block."""
    per_dim = {MXFP8.value: 33, BFP8.value: 34}.get(code, 32)
    return per_dim * head_dim + (128 if code in (INT8.value, FP8_E4M3.value) else 0)


def interprets() -> bool:
    """Whether Triton's interpreter runs the kernels: they are functions of another kind then."""
    return not isinstance(bits_of, triton.JITFunction)


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """A device's CUDA compute capability; None for AMD, and for the interpreter."""
    if interprets() or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def has_e4m3(capability: tuple[int, int] | None) -> bool:
    """Whether devices of a compute capability convert to OCP E4M3 themselves."""
    return capability is not None and capability >= (8, 9)


def chains(capability: tuple[int, int] | None) -> bool:
    """Whether a device starts a kernel while the one before it still runs (programmatic dependent launch).

    From one kernel to the next a GPU idles for about a microsecond, where those of a step for few sequences take ten.
    So the small ones are launched dependently (``launch_options``): such a kernel begins as soon as all programs of the
    one before it have ended or said ``gdc_launch_dependents``, and says ``gdc_wait`` before it writes anything, and
    before it reads what a kernel that may still run writes. That lasts until the one before it has ended, all of whose
    programs, or one of them at least on every path, have waited likewise or begun after the end of their predecessor:
    so all kernels before have ended. Linear layers, and attention over long prefixes, are launched as usual, as all
    else is: their programs are long, and must find all multiprocessors empty to be spread over them evenly.
    """
    return capability is not None and capability >= (9, 0)


def launch_options(capability: tuple[int, int] | None) -> dict[str, int | bool]:
    """What Triton needs to know to launch a kernel dependently, where the device can."""
    return {"launch_pdl": True} if chains(capability) else {}


def check_head_dim(head_dim: int) -> None:
    """Raise ValueError for what the kernels are not written for."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {HEAD_DIMS} on this device, not {head_dim}")


def check_place(tensors: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless all tensors are aligned for 128-bit access and on one device that kernels can run on."""
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, not on {device}")
    check_aligned(tensors)
    if not interprets() and device.type != "cuda":
        raise ValueError(f"Triton kernels run on a GPU, not on {device}")


def check_aligned(tensors: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless all tensors begin where 128-bit access may."""
    for name, tensor in tensors.items():
        if tensor.data_ptr() % ALIGN_BYTES:
            raise ValueError(f"{name}, {described(tensor)}, must begin at a multiple of {ALIGN_BYTES} bytes")


def check_pinned(tensors: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless kernels can write to these tensors of the host."""
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu" or not (interprets() or tensor.is_pinned()):
            raise ValueError(f"a kernel writes to {name}, on {tensor.device}: it must be pinned memory of the host")


def check_metadata(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a tensor is contiguous int32 of this shape; -1 stands for any size."""
    check_tensor(name, tensor, torch.int32, shape)


def check_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a tensor is contiguous, of this dtype and shape; -1 stands for any size."""
    fits = tensor.dim() == len(shape) and all(w in (-1, n) for n, w in zip(tensor.shape, shape, strict=True))
    if tensor.dtype != dtype or not fits or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {str(dtype).removeprefix('torch.')} {list(shape)}, not {described(tensor)}"
        )


def described(tensor: torch.Tensor) -> str:
    """A tensor that does not fit, as errors tell of it."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, strides {tensor.stride()}"


@triton.jit
def bits_of(x):
    """The bits of float32 values."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits):
    """The float32 values that have these bits."""
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def to_f32(x):
    """Float32 or bfloat16 as float32: by bits, since the interpreter's cast is wrong for subnormal numbers."""
    if x.dtype == tl.bfloat16:
        return float_of(x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    else:
        return x


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """Float32 as it is, or rounded to bfloat16, to nearest even."""
    if dtype == tl.bfloat16:
        if INTERPRETED:  # its own cast truncates
            bits = bits_of(x)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            # A NaN whose payload is in the low bits would round to an infinity or to zero.
            rounded = tl.where((bits & 0x7FFFFFFF) > INFINITY_BITS, 0x7FC0, rounded).to(tl.uint16)
            return rounded.to(tl.bfloat16, bitcast=True)
        else:
            return x.to(tl.bfloat16)
    else:
        return x


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Float32 rounded to what the type can hold, still float32."""
    return to_f32(narrowed(x, dtype))


@triton.jit
def store_rounded(pointers, x, mask):
    """Store float32 as it is, or rounded to bfloat16, to nearest even."""
    tl.store(pointers, narrowed(x, pointers.dtype.element_ty), mask=mask)


@triton.jit
def butterflies(x, BLOCK: tl.constexpr):
    """Each ``BLOCK`` consecutive values, a power of two up to 256, times Sylvester's Hadamard matrix, unscaled: by the
    sums of ``turned`` in cpu_turn, in their order.

    Nothing goes through shared memory as long as a warp holds the block: what a value is paired with is in its thread,
    or one shuffle away.
    """
    for stage in tl.static_range(8):
        if BLOCK >> (stage + 1) > 0:
            x = _butterfly(x, BLOCK >> (stage + 1))
    return x


@triton.jit
def _butterfly(x, APART: tl.constexpr):
    """The sums of values that stand APART apart, and their differences."""
    pairs = tl.reshape(x, [x.numel // (2 * APART), 2, APART])
    if INTERPRETED:  # it would fold by a loop in Python
        low, high = tl.split(tl.permute(pairs, [0, 2, 1]))
        partner = tl.permute(tl.join(high, low), [0, 2, 1])
    else:
        bits = bits_of(pairs)
        partner = float_of(bits ^ tl.xor_sum(bits, axis=1, keep_dims=True))
    sign = 1.0 - 2.0 * tl.arange(0, 2).to(tl.float32)[None, :, None]
    return tl.reshape(tl.fma(pairs, tl.broadcast_to(sign, pairs.shape), partner), x.shape)


@triton.jit
def divide(x, divisors):
    """x over divisors that are spread over it, correctly rounded for quotients above 2^-100 (quantizing rounds smaller
    ones to zero).

    Two steps of Markstein's correction of a product with the correctly rounded reciprocal: half the instructions of
    div_rn, which works out each element's reciprocal and watches for exponents that cannot occur once the divisor is
    scaled into 1..2 (exactly: by a power of two).
    """
    field = bits_of(divisors) & 0x7F800000
    power = float_of((254 << 23) - field)
    divisor = divisors * power
    inverse = tl.broadcast_to(tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor), x.shape)
    minus_divisor = tl.broadcast_to(-divisor, x.shape)
    x = x * power
    quotient = x * inverse
    quotient = tl.fma(tl.fma(minus_divisor, quotient, x), inverse, quotient)
    return tl.fma(tl.fma(minus_divisor, quotient, x), inverse, quotient)


@triton.jit
def to_e4m3(x, HARDWARE: tl.constexpr, BIAS: tl.constexpr = 7):
    """Float32 rounded to E4M3, ties to even, saturating; as bytes. The OCP format has bias 7 and ends at 448; AMD's
    fnuz, of bias 8 and always made by hand, ends at 240 and has no negative zero."""
    if HARDWARE and BIAS == 7:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = bits_of(x)
        magnitude = bits & 0x7FFFFFFF
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - BIAS) << 3)
        normal = tl.minimum(normal, 0x7E if BIAS == 7 else 0x7F)
        size = float_of(magnitude)
        # Subnormal numbers are 2^(-2 - BIAS) apart.
        subnormal = bits_of(size + 2.0 ** (21 - BIAS)) & 0xF
        encoded = tl.where(size < 2.0 ** (1 - BIAS), subnormal, normal)
        sign = (bits >> 24) & 0x80
        if BIAS == 8:
            sign = tl.where(encoded == 0, 0, sign)
        return (encoded | sign).to(tl.uint8)
