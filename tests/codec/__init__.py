"""What every codec must do, run for each (`test_contract.py`), also in an engine (`test_restores.py`)."""
