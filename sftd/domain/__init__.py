"""What sftd decides: events, spec, run state, decisions. Pure: `now` and ids are passed in; nothing here does I/O."""
