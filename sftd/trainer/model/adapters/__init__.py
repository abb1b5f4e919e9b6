"""Low-rank adapters beside the products of a frozen model."""
