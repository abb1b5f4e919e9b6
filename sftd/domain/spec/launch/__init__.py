"""Where and how a run is started: the kinds of launchers and the rules of `launch`."""
