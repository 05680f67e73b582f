"""What every sight must let an answer see, and what each of them does besides."""
