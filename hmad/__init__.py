"""hmad: prefill on cheap low-precision accelerators, decode on HBM, raw quantized KV in between."""

__version__ = "0.3.0"
