"""Commands that show runs, and `sftd gc`. None imports another."""
