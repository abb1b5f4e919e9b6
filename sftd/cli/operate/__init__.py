"""Commands for who runs sftd: database, MLflow, notices, completion."""
