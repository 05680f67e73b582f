"""What a codec does to a model's answers, against the exact cache."""
