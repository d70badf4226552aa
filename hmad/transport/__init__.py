"""Frames on sockets: asyncio connections, sessions with peers, liveness."""
