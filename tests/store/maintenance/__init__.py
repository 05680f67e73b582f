"""Looking after stores, whatever the tier."""
