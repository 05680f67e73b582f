"""The programs of `benchmarks/`, in small."""
