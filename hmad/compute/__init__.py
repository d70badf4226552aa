"""Numbers: weights, model, KV codecs, arena, sampler, devices. torch, but no asyncio."""
