"""What eviction policies save."""
