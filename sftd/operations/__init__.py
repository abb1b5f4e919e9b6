"""Operations on runs: commands, each one function and one transaction, and read-only queries."""
