"""`sftd doctor`: one module for each part of an installation."""
