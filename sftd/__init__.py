"""sftd: an event-sourced experiment tracker and training daemon for supervised fine-tuning."""

__version__ = "0.2.0"
