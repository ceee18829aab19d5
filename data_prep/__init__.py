"""Turn images as people have them into shards with an index, and verify such shards."""
