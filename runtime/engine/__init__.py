"""The thin runtime: a real transformer with a paged KV cache, scheduled like the cluster model."""
