"""Text to batches of token ids: sources, packing, and streams that can be continued."""
