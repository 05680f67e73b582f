"""An OpenAI-compatible server over the embedded engine, and its page. Needs `pip install 'cakekv[serve]'`."""
