"""What both drivers do to a chunk between store and cache: read it in slices, verify it, decode it."""
