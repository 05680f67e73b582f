"""The package as users get it: imports, public names, types, installed on every Python; `make test-package`."""
