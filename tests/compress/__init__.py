"""What every method that keeps fewer tokens must do (`test_contract.py`), and what each of them keeps."""
