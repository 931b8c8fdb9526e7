"""`lorashard pull` and `push`: shard directories from and to the Hub, object storage and other URLs."""
