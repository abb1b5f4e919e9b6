"""Commands for operators: database, MLflow, notices."""
