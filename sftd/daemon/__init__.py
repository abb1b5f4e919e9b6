"""The long-running process: claims runs, supervises attempts, rescues those of dead daemons, feeds mirrors and notices."""
