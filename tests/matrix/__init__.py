"""Every family of models (`models.py`) at every meeting point."""
