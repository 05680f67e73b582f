"""Reports as pictures, tables and traces."""
