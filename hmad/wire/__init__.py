"""The protocol between nodes, sans-IO: bytes in, events out. No asyncio, no torch."""
