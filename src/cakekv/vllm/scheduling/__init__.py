"""The half of the plug-in that runs in vLLM's scheduler."""
