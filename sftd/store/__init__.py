"""SQL: tables, engines and their differences, event store, queue with leases, positions. No decisions."""
