"""The kinds of files that chats come in."""
