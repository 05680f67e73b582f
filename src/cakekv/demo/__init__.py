"""What `cakekv demo` runs: a small model, a long document, and one prompt three ways."""
