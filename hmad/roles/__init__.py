"""What a node does: prefill, decode, and the pure decisions of the scheduler."""
