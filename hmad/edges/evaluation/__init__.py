"""``hmad eval``: what a prefill precision and a KV format cost in quality, measured through the real path."""
