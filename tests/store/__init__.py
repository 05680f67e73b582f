"""What every tier must do, run for each (`test_contract.py`), and what only one does; `servers.py` starts servers."""
