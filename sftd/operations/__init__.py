"""What can be done with runs: one function, one transaction. And what can be read of them."""
