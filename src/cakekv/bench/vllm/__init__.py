"""Measuring the plug-in: `vllm serve` as a process, requests to it, and peers to compare with."""
