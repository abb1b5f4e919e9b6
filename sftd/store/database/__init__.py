"""Tables, engines, migrations, copies and backups of a database."""
