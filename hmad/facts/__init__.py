"""What everyone may know: errors, configuration, KV formats, sampling parameters, names. No torch, no asyncio."""
